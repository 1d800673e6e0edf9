"""Options in general: sizes, ranges, and where a checked dataclass looks."""

import os
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.options import Bounds, Checked, Size, option


@dataclass(frozen=True, kw_only=True)
class Example(Checked):
    """Options of nothing."""

    side: int = option(1, "a side", group="run", at_least=1)
    files: tuple[str, ...] = option((), "files, or NAME=FILE", group="run", path=True)


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Bounds(at_least=1), "at least 1", [1, 2.5], [0.9, float("nan"), float("inf")]),
        (Bounds(above=0), "more than 0", [1e-9], [0, -1, float("nan"), float("inf")]),
        (Bounds(at_least=0, at_most=1), "between 0 and 1", [0, 0.5, 1], [-0.1, 1.1]),
        (Bounds(above=0, at_most=1), "more than 0, at most 1", [0.1, 1], [0, 1.1]),
    ],
)
def test_ranges(bounds: Bounds, text: str, inside: list[float], outside: list[float]) -> None:
    assert str(bounds) == text
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)


def test_a_home_folder_is_filled_in_also_behind_a_name() -> None:
    home = os.path.expanduser("~")
    assert Example(files=("~/x", "jbu=~/y", "~", "/z/~", "s3://b/k?v=~/t")).files == (
        f"{home}/x", f"jbu={home}/y", home, "/z/~", "s3://b/k?v=~/t",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="files='~nobody-here/x': there is no such home folder"):
        Example(files=("~nobody-here/x",))


def test_a_wrong_type_is_refused() -> None:
    for value in ("3", True, 2.0, None):
        with pytest.raises(ConfigError, match=r"^side=.* must be a whole number$"):
            Example(side=value)  # type: ignore[arg-type]


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_size_reads_back_from_its_text(height: int, width: int) -> None:
    size = Size(height, width)
    assert str(size) == f"{height}x{width}"
    assert Size.parse(str(size)) == Size.parse([height, width]) == Size.parse((height, width)) == size
    assert Size.parse(size) == size
    assert Size.parse(height) == Size.parse(str(height)) == Size(height, height)


@pytest.mark.parametrize(("text", "size"), [(" 3 X 4 ", (3, 4)), ("03x4", (3, 4)), ("7", (7, 7))])
def test_spellings_of_a_size(text: str, size: tuple[int, int]) -> None:
    assert Size.parse(text) == size


@pytest.mark.parametrize("text", ["", "x", "3x", "x3", "3x4x5", "-3", "3.5", 3.5, [1.5, 2], [1, 2, 3], [-1, 2], None])
def test_texts_that_are_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="a size is HEIGHTxWIDTH, such as 352x480, or one number for a square, not"):
        Size.parse(text)

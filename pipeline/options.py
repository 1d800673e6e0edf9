"""Options: fields with help and range, in frozen dataclasses that check themselves on construction."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from math import isfinite
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pipeline.errors import ConfigError

__all__ = ["Bounds", "Checked", "Size", "option"]


class Size(NamedTuple):
    """(height, width) in pixels, written ``352x480``, or ``224`` for a square."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @staticmethod
    def parse(text: object) -> "Size":
        """From ``"352x480"``, ``"224"``, 224 or a pair of numbers.

        Raises:
            ValueError: anything else.
        """
        if isinstance(text, (list, tuple)) and len(text) == 2:
            text = f"{text[0]}x{text[1]}"
        match = re.fullmatch(r"\s*(\d+)(?:\s*[xX]\s*(\d+))?\s*", str(text))
        if match is None:
            raise ValueError(f"a size is HEIGHTxWIDTH, such as 352x480, or one number for a square, not {text!r}")
        return Size(int(match[1]), int(match[2] or match[1]))


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The range of a number; it must also be finite. As text: ``at least 1``."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least} and {self.at_most}"
        texts = {"at least": self.at_least, "more than": self.above, "at most": self.at_most}
        return ", ".join(f"{word} {value}" for word, value in texts.items() if value is not None)


def option(
    default: Any,
    text: str,
    *,
    group: str,
    run: bool = False,
    path: bool = False,
    before: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field with its help and range.

    Args:
        default: its default; ``MISSING`` where it must be given; ``dict`` for an empty one.
        text: one line of help, without the range.
        group: the heading it stands under in the help.
        run: it changes how a job runs and not what it makes.
        path: it names files or folders: never empty, and a leading ``~`` is the home folder.
        before: what was done before there was this option, where that is not its default.
        at_least, above, at_most: the range of its number, or of each of its numbers.
    """
    bounds = Bounds(at_least=at_least, above=above, at_most=at_most)
    metadata = {
        "help": text,
        "group": group,
        "run": run,
        "path": path,
        "before": before,
        "bounds": None if bounds == Bounds() else bounds,
    }
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Options that are checked on construction: types, choices, ranges, and then their combinations.

    Raises:
        ConfigError: values that cannot be; all of them are named.
    """

    def __post_init__(self) -> None:
        problems: list[str] = []
        kind: Any = type(self)
        hints = _hints(kind)
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata.get("path"):
                value = _expanded(value)
                object.__setattr__(self, one.name, value)
            problems += _problems(one.name, value, hints[one.name], one.metadata)
        # Combinations are looked at only where each value can be.
        problems = problems or [text for broken, text in self._checks() if broken]
        if problems:
            raise ConfigError("; ".join(problems))

    def _checks(self) -> Sequence[tuple[bool, str]]:
        """Combinations of values that cannot be: whether this is one, and the text that says so."""
        return []


@lru_cache
def _hints(options: Any) -> dict[str, Any]:
    return get_type_hints(options)


def _expanded(value: Any) -> Any:
    """Paths with a leading ``~`` replaced by the home folder; in ``NAME=FILE`` that of the file."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if not isinstance(value, str):
        return value
    name, equals, file = value.rpartition("=")
    if equals and file.startswith("~") and re.fullmatch(r"\w+", name):
        return f"{name}={os.path.expanduser(file)}"
    return os.path.expanduser(value)


def _problems(name: str, value: Any, hint: Any, metadata: Any) -> Iterator[str]:
    """What is wrong with an option's value by itself."""
    kinds = list(_kinds(hint))
    if value is None and type(None) in kinds:
        return
    values = value if isinstance(value, tuple) else (value,)
    shown = str(value) if isinstance(value, Size) else repr(value)
    length = _length(hint)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    bounds: Bounds | None = metadata.get("bounds")
    if length is not None and (not isinstance(value, tuple) or len(value) != length):
        yield f"{name}={shown} must be {length} numbers"
    elif choices and not {int, float} & set(kinds) and any(one not in choices for one in values):
        yield f"{name}={shown} must be one of {', '.join(map(str, choices))}"
    elif {int, float} & set(kinds) and not (choices and value in choices):
        whole = float not in kinds
        if any(isinstance(one, bool) or not isinstance(one, int if whole else (int, float)) for one in values):
            words = "".join(f", or {choice}" for choice in choices)
            yield f"{name}={shown} must be a {'whole ' if whole else ''}number{words}"
        elif any(one not in (bounds or Bounds()) for one in values):
            yield f"{name}={shown} must be {bounds or 'finite'}" + (" on both sides" if isinstance(value, Size) else "")
    elif str in kinds and not all(isinstance(one, str) for one in values):
        yield f"{name}={shown} must be text"
    elif metadata.get("path"):
        if "" in values:
            yield f"{name} is empty; give a path or URL"
        for one in values:
            if one.startswith("~") and "://" not in one:
                yield f"{name}={one!r}: there is no such home folder; write it without ~"


def _kinds(hint: Any) -> Iterator[Any]:
    """The types and literals that a hint is made of."""
    if hint is Size:
        yield int
    elif get_origin(hint) in (Union, UnionType, tuple):
        for one in get_args(hint):
            if one is not Ellipsis:
                yield from _kinds(one)
    else:
        yield hint


def _length(hint: Any) -> int | None:
    """How many numbers a tuple has where that is fixed."""
    for one in (hint, *get_args(hint)):
        if one is Size:
            return 2
        if get_origin(one) is tuple and Ellipsis not in get_args(one):
            return len(get_args(one))
    return None

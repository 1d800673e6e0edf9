"""Decoding of labels: class maps, depth maps, class ids."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decode.kinds import LABELS, label_spec
from pipeline.decode.labels import decode_label
from pipeline.errors import ConfigError, Reason, SampleError
from tests.pipeline.decode.pictures import (
    chunk,
    encode,
    gradient,
    raw_png,
)


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "expected"),
    [
        (1, 0, b"\x1b", [0, 0, 0, 1, 1, 0, 1, 1]),
        (2, 0, b"\x1b", [0, 1, 2, 3]),
        (4, 0, b"\x1b\xe4", [1, 11, 14, 4]),
        (8, 0, b"\x00\x07\xff", [0, 7, 255]),
        (16, 0, b"\x00\x07\xff\xfe", [7, 65534]),
        (1, 3, b"\x1b", [0, 0, 0, 1, 1, 0, 1, 1]),
        (2, 3, b"\x1b", [0, 1, 2, 3]),
        (4, 3, b"\x1b\xe4", [1, 11, 14, 4]),
        (8, 3, b"\x00\x07\x0f", [0, 7, 15]),
    ],
)
def test_seg_gives_the_stored_numbers(depth: int, colour: int, rows: bytes, expected: list[int]) -> None:
    palette = [chunk(b"PLTE", bytes(48))] if colour == 3 else []  # all black: colours would all be one
    label = decode_label("seg", "seg.png", raw_png(depth, colour, (2, len(expected)), rows * 2, *palette))
    assert label.dtype == (np.uint16 if depth == 16 else np.uint8)
    np.testing.assert_array_equal(label, [expected] * 2)


def test_depth_png_in_metres() -> None:
    sixteen = encode(np.array([[0, 1, 1500], [65535, 2, 3]], np.uint16), "PNG")
    depth = decode_label("depth", "depth.png", sixteen)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, [[np.nan, 0.001, 1.5], [65.535, 0.002, 0.003]], rtol=1e-6)
    eight = encode(np.array([[0, 200]], np.uint8), "PNG")
    np.testing.assert_allclose(
        decode_label("depth", "depth.png", eight, depth_png_scale=0.05), [[np.nan, 10]], rtol=1e-6
    )


def npy(array: npt.NDArray[Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, ">f4", np.uint32])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
def test_depth_npy_in_metres(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.array([[0, 1, 2], [3, 4, 100]]).astype(dtype)
    for order in ("C", "F"):
        data = npy(np.asarray(values.reshape(shape), order=order))
        depth = decode_label("depth", "depth.npy", data, depth_npy_scale=0.5)
        assert depth.dtype == np.float32
        np.testing.assert_array_equal(depth, np.array([[np.nan, 0.5, 1], [1.5, 2, 50]], np.float32))


def test_depth_that_is_not_positive_and_finite_is_unknown() -> None:
    values = np.array([[1e300, -1, 0, np.nan, np.inf, -np.inf, 2]])
    np.testing.assert_array_equal(decode_label("depth", "depth.npy", npy(values)), [[np.nan] * 6 + [2]])


@pytest.mark.parametrize("ext", ["cls", "cls.txt"])
@pytest.mark.parametrize(("text", "value"), [(b"0", 0), (b" 12\n", 12), (b"\xef\xbb\xbf+7\r\n", 7)])
def test_class(ext: str, text: bytes, value: int) -> None:
    label = decode_label("cls", ext, text)
    assert label.dtype == np.int64
    assert label.shape == ()
    assert label == value


class Harmful:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("kind", "ext", "data", "reason", "text"),
    [
        (
            "seg",
            "seg.png",
            encode(gradient(4, 4), "PNG"),
            "LABEL_UNDECODABLE",
            "8-bit RGB PNG.*class ids, not colours",
        ),
        ("seg", "seg.png", encode(gradient(4, 4), "PNG", "RGBA"), "LABEL_UNDECODABLE", "8-bit RGBA PNG"),
        ("seg", "seg.png", encode(gradient(4, 4), "JPEG"), "LABEL_UNDECODABLE", "it is jpeg.*PNG is needed"),
        ("seg", "seg.png", b"", "LABEL_UNDECODABLE", "it is no known image"),
        ("seg", "seg.png", encode(gradient(40, 40), "PNG", "L")[:200], "LABEL_UNDECODABLE", "truncated"),
        ("depth", "depth.png", encode(gradient(4, 4), "PNG", "P"), "LABEL_UNDECODABLE", "8- or 16-bit grey"),
        (
            "depth",
            "depth.npy",
            npy(np.zeros((2, 2, 2))),
            "LABEL_UNDECODABLE",
            r"float64 of shape \(2, 2, 2\)",
        ),
        ("depth", "depth.npy", npy(np.zeros(4)), "LABEL_UNDECODABLE", r"of shape \(4,\)"),
        ("depth", "depth.npy", npy(np.zeros((2, 2), bool)), "LABEL_UNDECODABLE", "bool of shape"),
        ("depth", "depth.npy", npy(np.zeros((2, 2), complex)), "LABEL_UNDECODABLE", "complex128 of shape"),
        ("depth", "depth.npy", npy(np.zeros((9, 9)))[:-8], "LABEL_UNDECODABLE", "ValueError"),
        ("depth", "depth.npy", b"PK\x03\x04 a zip", "LABEL_UNDECODABLE", "magic string"),
        ("depth", "depth.npy", b"", "LABEL_UNDECODABLE", "EOF"),
        ("cls", "cls", b"", "LABEL_UNDECODABLE", "'' is not an integer"),
        ("cls", "cls", b"1.5", "LABEL_UNDECODABLE", "'1.5' is not an integer"),
        ("cls", "cls", b"1_000", "LABEL_UNDECODABLE", "not an integer"),
        ("cls", "cls", b"\xff\xfe", "LABEL_UNDECODABLE", "UnicodeDecodeError"),
        ("cls", "cls", b"-1", "LABEL_RANGE", "class id -1 is not in 0 to"),
        ("cls", "cls", b"9223372036854775808", "LABEL_RANGE", "is not in 0 to 9223372036854775807"),
        ("seg", "seg.png", raw_png(8, 0, (1, 1001), bytes(1001)), "TOO_LARGE", "1001 pixels"),
        ("depth", "depth.npy", npy(np.zeros((1, 1001))), "TOO_LARGE", "1001 pixels"),
    ],
)
def test_bad_labels(kind: str, ext: str, data: bytes, reason: str, text: str) -> None:
    with pytest.raises(SampleError, match=text) as caught:
        decode_label(kind, ext, data, max_pixels=1000 if reason == "TOO_LARGE" else 10**6)
    assert caught.value.reason is Reason[reason]


def test_npy_is_never_unpickled_and_its_header_never_trusted(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    objects = np.empty((1, 1), object)
    objects[0, 0] = Harmful(target)
    with pytest.raises(SampleError, match="object of shape"):
        decode_label("depth", "depth.npy", npy(objects, allow_pickle=True))
    assert not target.exists()
    huge = npy(np.zeros((3, 3))).replace(b"(3, 3)", b"(9999999, 9999999)"[:6])
    assert huge != npy(np.zeros((3, 3)))
    with pytest.raises(SampleError):
        decode_label("depth", "depth.npy", huge)


@given(st.data())
@settings(max_examples=200)
def test_changed_label_bytes_give_a_label_or_a_sample_error(data: st.DataObject) -> None:
    files = {
        "seg.png": ("seg", encode(gradient(12, 9)[:, :, 0], "PNG")),
        "depth.png": ("depth", encode(np.arange(99, dtype=np.uint16).reshape(9, 11), "PNG")),
        "depth.npy": ("depth", npy(np.ones((5, 6), np.float32))),
        "cls": ("cls", b"12"),
    }
    ext = data.draw(st.sampled_from(sorted(files)))
    kind, original = files[ext]
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    try:
        label = decode_label(kind, ext, bytes(changed[: data.draw(st.integers(0, len(original)))]))
    except SampleError as error:
        reason: Reason = error.reason
    else:
        reason = Reason.LABEL_UNDECODABLE
        assert label.dtype in (np.uint8, np.uint16, np.float32, np.int64)
    assert reason in (Reason.LABEL_UNDECODABLE, Reason.LABEL_RANGE, Reason.TOO_LARGE)


def test_label_table() -> None:
    assert {kind: (spec.dtype, spec.per_pixel) for kind, spec in LABELS.items()} == {
        "seg": ("uint8", True),
        "depth": ("float32", True),
        "cls": ("int64", False),
    }
    assert (label_spec("seg").fill, label_spec("seg", "uint16").fill, label_spec("cls").fill) == (
        255,
        65535,
        -1,
    )
    assert label_spec("seg", "uint16").dtype == "uint16"
    assert np.isnan(label_spec("depth").fill)
    with pytest.raises(TypeError):
        LABELS["seg"] = LABELS["cls"]  # type: ignore[index]
    with pytest.raises(ConfigError, match="unknown label kind 'boxes'; choose from seg, depth, cls"):
        decode_label("boxes", "json", b"")
    with pytest.raises(ConfigError, match=r"a seg label is read from seg\.png, not from 'png'"):
        decode_label("seg", "png", b"")

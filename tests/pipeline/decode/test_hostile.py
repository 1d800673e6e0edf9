"""Decoding of files that are too large, cut short, changed or noise."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from pipeline.errors import Reason, SampleError
from tests.pipeline.decode.pictures import (
    FILES,
    chunk,
    decode,
    fails,
    raw_png,
)


@pytest.mark.parametrize("kind", FILES)
def test_the_pixel_limit_holds_before_decoding(kind: str) -> None:
    error = fails(
        Reason.TOO_LARGE,
        r"\(40, 53\) is 2120 pixels by its header, more than max_pixels = 2119",
        FILES[kind],
        max_pixels=2119,
    )
    assert "raise max_pixels" in error.detail
    assert decode(FILES[kind], max_pixels=2120).source_size == (40, 53)


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    """Its pixel data is not there: whatever tried to decode it would say so."""
    bomb = raw_png(8, 2, (1, 1), bytes(3))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = bomb.replace(chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), chunk(b"IHDR", header))
    fails(Reason.TOO_LARGE, r"\(60000, 60000\) is 3600000000 pixels", bomb)
    jpeg = FILES["jpeg"].replace(struct.pack(">HH", 40, 53), struct.pack(">HH", 60000, 60000), 1)
    fails(Reason.TOO_LARGE, r"\(60000, 60000\) is 3600000000 pixels", jpeg)


def test_our_limit_counts_where_pillows_is_lower() -> None:
    """Pillow warns, and at twice its limit raises; the process's limit is neither used nor changed."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 100
    try:
        assert decode(FILES["png"]).flags == ()
        assert Image.MAX_IMAGE_PIXELS == 100
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize("kind", FILES)
def test_a_cut_file_never_gives_a_partial_picture(kind: str) -> None:
    data = FILES[kind]
    whole = decode(data).pixels
    reasons = set()
    for length in {*range(0, 200, 9), *range(200, len(data), max(1, len(data) // 60)), len(data) - 1}:
        try:
            pixels = decode(data[:length]).pixels
        except SampleError as error:
            reasons.add(error.reason)
        else:
            np.testing.assert_array_equal(pixels, whole, err_msg=f"{kind} cut at {length}")
            assert length > len(data) - 8  # padding and trailers only
    assert reasons <= {Reason.TRUNCATED, Reason.UNDECODABLE}
    if kind not in ("jp2",):
        assert Reason.TRUNCATED in reasons


def test_a_process_that_allows_truncated_images_does_not_loosen_us() -> None:
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        fails(Reason.TRUNCATED, "truncated", FILES["bmp"][:3000])
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def test_png_with_changed_bits_is_found_by_its_checksums() -> None:
    png = FILES["png"]
    for at in range(8, len(png), 97):
        damaged = png[:at] + bytes([png[at] ^ 4]) + png[at + 1 :]
        with pytest.raises(SampleError) as caught:
            decode(damaged)
        assert caught.value.reason in (Reason.UNDECODABLE, Reason.TRUNCATED)
    fails(Reason.UNDECODABLE, "checksum of chunk b'IDAT'", png[:200] + b"\0\0\0" + png[203:])


def _survives(data: bytes) -> None:
    try:
        decoded = decode(data, max_pixels=20_000, min_size=(8, 8))
    except SampleError as error:
        if error.reason.value.startswith(("image", "label", "tar")):
            raise
        return
    height, width, channels = decoded.pixels.shape
    assert decoded.pixels.dtype == np.uint8
    assert channels == 3
    assert min(height, width) > 0
    assert decoded.source_size[0] * decoded.source_size[1] <= 20_000


@given(
    kind=st.sampled_from(sorted(FILES)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=6),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
    in_header=st.booleans(),
)
@settings(max_examples=600)
def test_changed_bytes_give_a_picture_or_a_sample_error(
    kind: str, edits: list[tuple[float, bytes]], cut: float, in_header: bool
) -> None:
    data = bytearray(FILES[kind])
    reach = 160 if in_header else len(data)
    for where, value in edits:
        at = int(where * reach)
        data[at : at + len(value)] = value
    _survives(bytes(data[: int(cut * len(data))]))


@given(st.sampled_from(sorted(FILES)), st.binary(max_size=200))
@settings(max_examples=200)
def test_noise_behind_a_signature(kind: str, noise: bytes) -> None:
    _survives(FILES[kind][:16] + noise)

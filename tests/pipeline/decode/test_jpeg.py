"""Decoding of JPEG: structures, bit errors, scaled decoding."""

import time
from typing import Any

import numpy as np
import pytest
import simplejpeg

from pipeline.decode.jpeg import MAX_SCANS
from pipeline.errors import Reason
from tests.pipeline.decode.pictures import (
    ARITHMETIC,
    FILES,
    SAMPLED_4X2,
    close,
    decode,
    encode,
    exif,
    fails,
    gradient,
    many_scans,
    textured,
)


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"subsampling": 0},
        {"subsampling": 1},
        {"optimize": True},
        {"keep_rgb": True},
        {"comment": b"\xff" * 300},
        {"exif": exif(1), "icc_profile": b"\xff\xd9" * 40000},
    ],
    ids=str,
)
def test_legal_jpegs_of_every_structure(options: dict[str, Any]) -> None:
    image = gradient(97, 131)
    decoded = decode(encode(image, "JPEG", quality=95, **options))
    assert decoded.decoder == "simplejpeg"
    assert decoded.flags == ()
    assert close(decoded.pixels, image, 3)


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411"])
def test_jpeg_of_every_named_sampling(sampling: str) -> None:
    image = gradient(97, 131)
    decoded = decode(simplejpeg.encode_jpeg(image, quality=95, colorsubsampling=sampling))
    assert (decoded.decoder, decoded.flags) == ("simplejpeg", ())
    assert close(decoded.pixels, image, 4)


def test_rare_jpegs() -> None:
    image = gradient(19, 27)
    assert decode(ARITHMETIC).decoder == "simplejpeg"
    assert close(decode(ARITHMETIC).pixels, image, 10)
    rare = decode(SAMPLED_4X2)
    assert (rare.decoder, rare.flags) == ("pillow", ("lenient",))
    assert close(rare.pixels, image, 15)
    fails(Reason.TRUNCATED, "truncated", SAMPLED_4X2[:-20])
    # Fill bytes before a marker, and bytes after the end.
    jpeg = FILES["jpeg"]
    at = jpeg.index(b"\xff\xdb")
    padded = jpeg[:at] + b"\xff\xff" + jpeg[at:] + b"trailing \xff bytes"
    np.testing.assert_array_equal(decode(padded).pixels, decode(jpeg).pixels)
    turned = encode(gradient(24, 40), "JPEG", exif=exif(6))
    for fill in (b"\xff", b"\xff\xff"):
        assert decode(turned.replace(b"\xff\xe1", fill + b"\xff\xe1", 1)).orientation == 6
    twelve_bit = jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c")
    assert twelve_bit != jpeg
    fails(Reason.UNSUPPORTED, "precision", twelve_bit)


def test_more_scans_than_the_limit_are_refused_before_decoding() -> None:
    """A file of 4 MB and 30,000 empty scans decoded for more than 300 s: libjpeg-turbo #284."""
    started = time.monotonic()
    fails(
        Reason.TOO_LARGE,
        "jpeg with 30000 scans, more than the limit of 1000",
        many_scans(30_000, 9800),
        max_pixels=10**8,
    )
    assert time.monotonic() - started < 10
    fails(Reason.TOO_LARGE, "jpeg with 1001 scans", many_scans(MAX_SCANS + 1, 16))
    assert decode(many_scans(MAX_SCANS, 16)).pixels.shape == (16, 16, 3)


def test_scan_markers_in_metadata_are_not_scans() -> None:
    image = gradient(24, 40)
    decoded = decode(encode(image, "JPEG", quality=95, comment=b"\xff\xda" * 2 * MAX_SCANS))
    assert close(decoded.pixels, image, 3)


def test_grey_jpeg() -> None:
    image = gradient(31, 47)[:, :, 0]
    decoded = decode(encode(image, "JPEG", quality=95))
    assert (decoded.decoder, decoded.flags) == ("simplejpeg", ("grey",))
    assert close(decoded.pixels, image[:, :, None].repeat(3, axis=2), 2)


def test_adobe_cmyk_jpeg_is_not_inverted_and_bit_errors_are_found() -> None:
    image = gradient(64, 80)
    cmyk = encode(image, "JPEG", "CMYK", quality=95)
    assert b"Adobe" in cmyk
    decoded = decode(cmyk)
    assert (decoded.decoder, decoded.flags) == ("pillow", ("cmyk",))
    assert close(decoded.pixels, image, 4)
    fails(Reason.TRUNCATED, "truncated", cmyk[: len(cmyk) // 2])
    scan = cmyk.index(b"\xff\xda") + 40
    damaged = cmyk[:scan] + b"\xff\xd9" + cmyk[scan:]
    fails(Reason.UNDECODABLE, "premature end of data", damaged)


def test_jpeg_cut_anywhere_is_truncated() -> None:
    for jpeg in (FILES["jpeg"], encode(textured(40, 53), "JPEG", progressive=True, exif=exif(6))):
        for length in [*range(3, 700, 7), *range(700, len(jpeg), 31), len(jpeg) - 1]:
            fails(Reason.TRUNCATED, "truncated|Premature end", jpeg[:length])


def test_jpeg_with_changed_bits_is_never_smeared() -> None:
    """Pillow decodes all of these without a word."""
    jpeg = FILES["jpeg"]
    scan = jpeg.index(b"\xff\xda") + 14
    for at in range(scan + 20, len(jpeg) - 100, 150):
        damaged = jpeg[:at] + b"\xff\xd9" + jpeg[at + 2 :]
        fails(Reason.UNDECODABLE, "jpeg cannot be decoded.*[Cc]orrupt", damaged)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("size", [(801, 643), (640, 1283), (333, 333)])
@pytest.mark.parametrize("least", [(100, 60), (37, 79), (160, 160), (400, 10)])
def test_scaled_decoding_keeps_twice_the_size_and_the_geometry(
    orientation: int, size: tuple[int, int], least: tuple[int, int]
) -> None:
    jpeg = encode(gradient(*size), "JPEG", quality=95, exif=exif(orientation))
    full, scaled = decode(jpeg, max_pixels=10**7), decode(jpeg, max_pixels=10**7, min_size=least)
    assert scaled.source_size == full.source_size == full.pixels.shape[:2]
    # The largest of 1, 2, 4, 8 that leaves twice the wish.
    factor = max(
        n for n in (1, 2, 4, 8) if n == 1 or all(s // n >= 2 * m for s, m in zip(full.source_size, least, strict=True))
    )
    assert scaled.pixels.shape[:2] == tuple(-(-side // factor) for side in full.source_size)
    assert ("dct_scaled" in scaled.flags) == (factor > 1)
    top, left, height, width = scaled.extent
    assert (height, width) == tuple(side / factor for side in full.source_size)
    assert 0 <= top <= scaled.pixels.shape[0] - height
    assert 0 <= left <= scaled.pixels.shape[1] - width
    # Red and green are ramps over the source: they tell where each pixel of the scaled image lies.
    rows = (np.arange(scaled.pixels.shape[0]) + 0.5 - top) * factor
    columns = (np.arange(scaled.pixels.shape[1]) + 0.5 - left) * factor
    inner = np.ix_(
        (rows > 16) & (rows < full.source_size[0] - 16), (columns > 16) & (columns < full.source_size[1] - 16)
    )
    expected = full.pixels[
        np.ix_(
            rows.astype(int).clip(0, full.source_size[0] - 1),
            columns.astype(int).clip(0, full.source_size[1] - 1),
        )
    ]
    assert np.abs(scaled.pixels[inner].astype(int) - expected[inner])[..., :2].mean() < 1.5

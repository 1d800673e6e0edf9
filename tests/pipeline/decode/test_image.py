"""Decoding of every format, orientation, mode and depth against the pixels that were encoded."""

import io
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from pipeline.decode.labels import decode_label
from pipeline.decode.sniff import sniff
from pipeline.errors import Reason
from tests.pipeline.decode.pictures import (
    FILES,
    chunk,
    close,
    decode,
    encode,
    exif,
    fails,
    gradient,
    raw_png,
    textured,
)


@pytest.mark.parametrize("kind", FILES)
def test_type_comes_from_the_content(kind: str) -> None:
    assert sniff(FILES[kind]) == kind
    decoded = decode(FILES[kind])
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    assert decoded.source_size == (40, 53)
    assert decoded.extent == (0, 0, 40, 53)
    assert decoded.orientation == 1
    assert decoded.decoder == ("simplejpeg" if kind == "jpeg" else "pillow")
    assert decoded.flags == (("palette",) if kind == "gif" else ())
    lossless = kind in ("png", "webp", "bmp", "ppm", "tiff", "jp2")
    assert close(decoded.pixels, textured(40, 53), 0 if lossless else 15)


@pytest.mark.parametrize(
    ("data", "reason", "text"),
    [
        (b"", Reason.UNDECODABLE, "0 bytes that are no known image"),
        (b"\n <!DOCTYPE html><title>404", Reason.UNDECODABLE, r"begin b'\\n <!DOCTYPE html>.*web page saved"),
        (b"<?xml version='1.0'?><Error>", Reason.UNDECODABLE, "web page"),
        (b"Not found", Reason.UNDECODABLE, "they begin b'Not found'"),
        (bytes(range(128, 255)), Reason.UNDECODABLE, "127 bytes that are no known image"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            Reason.UNSUPPORTED,
            "heic is not read here.*convert it to one of",
        ),
        (b"8BPS\0\x01", Reason.UNSUPPORTED, "psd is not read here"),
        (b"\xff\x0a\xfa", Reason.UNSUPPORTED, "jxl is not read here"),
        (b"\x89PNG\r\n\x1a\n", Reason.TRUNCATED, "truncated: 8 bytes"),
        (b"GIF89a", Reason.UNDECODABLE, "gif cannot be decoded: its header is damaged or cut short"),
    ],
)
def test_what_is_no_image_is_refused_with_its_first_bytes(data: bytes, reason: Reason, text: str) -> None:
    fails(reason, text, data)


def test_avif_that_names_another_major_brand_is_avif() -> None:
    assert sniff(b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf") == "avif"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    image = gradient(24, 40)
    options: dict[str, Any] = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
    decoded = decode(encode(image, kind, quality=95, **options))
    tagged = Image.fromarray(image)
    tagged.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(tagged))
    assert close(decoded.pixels, expected, 6)
    assert decoded.source_size == expected.shape[:2]
    assert decoded.orientation == orientation
    assert decoded.flags == (("exif_rotated",) if orientation > 1 else ())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4], ids=["short", "long"])
def test_exif_in_either_byte_order(order: str, kind: int) -> None:
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *((8, 0) if kind == 3 else (8,)))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    block = b"Exif\0\0" + magic + struct.pack(order + "IHHHI", 8, 1, 274, kind, 1) + value
    assert decode(encode(gradient(24, 40), "JPEG", exif=block)).orientation == 8


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\x05\0", b"Exif\0\0XX*\0\x08\0\0\0"])
def test_damaged_exif_costs_a_flag_not_the_sample(block: bytes) -> None:
    decoded = decode(encode(gradient(24, 40), "JPEG", exif=block))
    assert decoded.orientation == 1
    assert decoded.flags == (() if block == b"Exif\0\0" else ("warned",))
    nonsense = exif(1).replace(struct.pack(">HHIHH", 274, 3, 1, 1, 0), struct.pack(">HHIHH", 274, 3, 1, 77, 0))
    assert decode(encode(gradient(24, 40), "JPEG", exif=nonsense)).orientation == 1


def test_pillows_warnings_become_a_flag_and_leave_no_trace() -> None:
    """A TIFF whose software tag points behind the file's end."""
    tiff = encode(gradient(24, 40), "TIFF", tiffinfo={305: "software"})
    at = tiff.index(struct.pack("<HHI", 305, 2, 9))
    broken = tiff[: at + 8] + struct.pack("<I", 10**8) + tiff[at + 12 :]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoded = decode(broken)
    assert decoded.flags == ("warned",)
    assert caught == []
    np.testing.assert_array_equal(decoded.pixels, gradient(24, 40))


def test_alpha_is_composited_over_white() -> None:
    image = gradient(20, 30)
    alpha = np.tile(np.linspace(0, 255, 30).astype(np.uint8), (20, 1))
    weight = alpha[:, :, None] / 255
    for kind in ("PNG", "WEBP", "TIFF"):
        decoded = decode(encode(np.dstack([image, alpha]), kind, lossless=True, exact=True))
        assert decoded.flags == ("alpha",)
        assert np.abs(decoded.pixels - (image * weight + 255 * (1 - weight))).max() <= 1.01
    grey = image[:, :, 0]
    decoded = decode(encode(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "PNG"))
    assert decoded.flags == ("alpha", "grey")
    assert np.abs(decoded.pixels[:, :, 1] - (grey * weight[:, :, 0] + 255 * (1 - weight[:, :, 0]))).max() <= 1.01


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "expected"),
    [
        (1, 0, b"\x50", [255, 255, 0, 255]),  # 0 1 0 1; 0 is transparent: white over white
        (2, 0, b"\x1b", [255, 85, 170, 255]),
        (4, 0, b"\x01\x2f", [0, 17, 255, 255]),
        (8, 0, b"\x00\x07\x08\xff", [0, 255, 8, 255]),
        (16, 0, b"\x00\x00\x12\x34\x12\x35\xff\xff", [0, 255, 18, 255]),
        (2, 3, b"\x1b", [255, 10, 20, 30]),
    ],
)
def test_transparent_colour_at_every_depth(depth: int, colour: int, rows: bytes, expected: list[int]) -> None:
    keys = {1: 1, 2: 0, 4: 2, 8: 7, 16: 0x1234}
    extra = [chunk(b"tRNS", struct.pack(">H", keys[depth]))]
    if depth == 1:
        expected = [0, 255, 0, 255]
    if colour == 3:
        extra = [
            chunk(b"PLTE", bytes(v for level in (0, 10, 20, 30) for v in [level] * 3)),
            chunk(b"tRNS", b"\0"),
        ]
    decoded = decode(raw_png(depth, colour, (1, 4), rows, *extra))
    np.testing.assert_array_equal(decoded.pixels[0], np.repeat(np.array(expected)[:, None], 3, axis=1))
    assert "alpha" in decoded.flags


@pytest.mark.parametrize("colour", [0, 2, 4, 6], ids=["grey", "rgb", "grey_alpha", "rgba"])
def test_sixteen_bit_png_is_scaled_not_clipped(colour: int) -> None:
    values = np.random.default_rng(3).integers(0, 65536, (8, 50, {0: 1, 2: 3, 4: 2, 6: 4}[colour]))
    if colour in (4, 6):
        values[:, :, -1] = 65535
    decoded = decode(raw_png(16, colour, (8, 50), values.astype(">u2").tobytes()))
    seen = values[:, :, :-1] if colour in (4, 6) else values
    error = np.abs(decoded.pixels - np.round(seen * (255 / 65535))).max()
    assert error <= (0 if colour == 0 else 1)
    assert "sixteen_bit" in decoded.flags


def test_sixteen_bit_grey_of_other_formats() -> None:
    values = np.random.default_rng(3).integers(0, 65536, (8, 50)).astype(np.uint16)
    expected = np.round(values * (255 / 65535))
    for data in (encode(values, "TIFF"), b"P5 50 8 65535\n" + values.astype(">u2").tobytes()):
        decoded = decode(data)
        assert decoded.flags == ("grey", "sixteen_bit")
        np.testing.assert_array_equal(decoded.pixels[:, :, 2], expected)
    # PhotometricInterpretation 0: white is zero.
    tiff = encode(values, "TIFF")
    inverted = tiff.replace(struct.pack("<HHIHH", 262, 3, 1, 1, 0), struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    assert inverted != tiff
    np.testing.assert_array_equal(decode(inverted).pixels[:, :, 0], 255 - expected)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_defined_white_are_unsupported(dtype: type) -> None:
    fails(Reason.UNSUPPORTED, "no defined white; convert it", encode(np.ones((4, 5), dtype), "TIFF"))


@pytest.mark.parametrize(
    ("mode", "kind", "flags", "error"),
    [
        ("1", "PNG", ("grey",), 0),
        ("L", "BMP", ("grey",), 0),
        ("P", "PNG", ("palette",), 0),
        ("CMYK", "TIFF", ("cmyk",), 1),
        ("YCbCr", "TIFF", (), 2),
        ("LAB", "TIFF", (), 3),
    ],
)
def test_every_colour_mode(mode: str, kind: str, flags: tuple[str, ...], error: float) -> None:
    image = Image.fromarray(gradient(30, 44)).convert(mode)
    decoded = decode(encode(image, kind))
    assert decoded.flags == flags
    assert close(decoded.pixels, np.asarray(image.convert("RGB")), error)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (16, 12), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    decoded = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
    assert "animated" in decoded.flags
    assert (decoded.pixels == (200, 0, 0)).all()


@pytest.mark.parametrize("folder", ["imagenet_sample", "camvid"])
def test_real_photographs_match_pillow(shared: Path, folder: str) -> None:
    """Strict decoding refuses none of them, and differs from Pillow's only by rounding."""
    archive = sorted((shared / "data" / folder).glob("*.tar"))[0]
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if name.endswith((".jpg", ".jpeg"))][:25]
        assert names
        for name in names:
            member = tar.extractfile(name)
            assert member is not None
            data = member.read()
            decoded = decode(data, max_pixels=10**8)
            expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
            assert close(decoded.pixels, expected, 0.5), name


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Raw profile\0\0" + zlib.compress(bytes(2 << 20))),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + zlib.compress(b"x" * (2 << 20))),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20))),
    ],
    ids=["text", "xmp", "icc"],
)
def test_a_png_is_its_pixels_whatever_its_metadata(extra: bytes) -> None:
    """Two megabytes of it made a photograph undecodable, whose every pixel is there."""
    rows = textured(4, 5).tobytes()
    plain, heavy = raw_png(8, 2, (4, 5), rows), raw_png(8, 2, (4, 5), rows, extra)
    assert np.array_equal(decode(heavy).pixels, decode(plain).pixels)
    seg = bytes(range(20))
    plain, heavy = raw_png(8, 0, (4, 5), seg), raw_png(8, 0, (4, 5), seg, extra)
    assert np.array_equal(decode_label("seg", "seg.png", heavy), decode_label("seg", "seg.png", plain))


def test_a_text_chunk_keeps_neither_exif_nor_transparency_from_being_read() -> None:
    turned = encode(textured(40, 53), "PNG", exif=exif(6), pnginfo=_text("Comment", "of a camera"))
    assert decode(turned).orientation == 6
    assert decode(turned).pixels.shape == (53, 40, 3)


def _text(key: str, value: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value)
    return info


def test_a_preview_is_not_the_image() -> None:
    """A camera's raw file was stored as its thumbnail, without a word."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    thumbnail = encode(textured(24, 32), "TIFF", tiffinfo=tags)
    fails(Reason.UNSUPPORTED, r"first picture of this tiff is a preview \(24x32\).*develop it to JPEG", thumbnail)
    tags[254] = 0
    assert decode(encode(textured(24, 32), "TIFF", tiffinfo=tags)).source_size == (24, 32)

"""Decoding: every format and flag against what was encoded; hostile bytes; labels; whole samples."""

import base64
import hashlib
import io
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from pipeline.decode.common import DecodedImage
from pipeline.decode.geometry import Geometry, apply_image, apply_label, orient
from pipeline.decode.kinds import LABELS, label_spec
from pipeline.decode.labels import decode_label
from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import decode_image, prepare_sample
from pipeline.decode.sniff import sniff
from pipeline.errors import ConfigError, Reason, SampleError

LIMIT = 1_000_000
Pixels = npt.NDArray[np.uint8]

# A 19x27 gradient as libjpeg writes it with arithmetic coding, and with luma sampled 4x2 times as finely as
# chroma: no encoder at hand writes either.
_HEAD = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8"
    "jhBplmUDiAeE-`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0=}"
)
ARITHMETIC = base64.b85decode(
    _HEAD + "O01*fP695|n0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf#07yVcSL@QzN+D6kOLtuTHB^eLQLh)fY*r(Mc0^DX+b>{"
    "=?N^j?C!RPrz2Lb}yP<et>L`h~!2j6"
)
SAMPLED_4X2 = base64.b85decode(
    _HEAD + "F01*fP695|n0YU%*5di}c0sq7R7ytnQ00RI30000000000000930t5yB!~h!*00IL60RaF2000000000000IF7VNntk|HJ?m0RaI"
    "400000000000000000jaB|HJ?p5dZ=M0RR910000000000000C9Au$90+5ij#0RRFK0}%i}0OBod6>DItTLk&A*jm^s*1?vx2^Fx"
    "pF4ky4iZWG>467U!RyZe^;SmsgmW82*|Je"
)


def gradient(height: int, width: int) -> Pixels:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], axis=-1).astype(np.uint8)


def textured(height: int, width: int, seed: int = 0) -> Pixels:
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return (gradient(height, width) + noise).clip(0, 255).astype(np.uint8)


def encode(array: npt.NDArray[Any] | Image.Image, kind: str, mode: str | None = None, **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[271] = "a maker's name, so that the tag sought is not the first"
    block[274] = orientation
    return block.tobytes()


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def raw_png(depth: int, colour: int, size: tuple[int, int], rows: bytes, *extra: bytes) -> bytes:
    """A PNG of exactly these stored samples; ``rows`` are the packed rows, each of equal length."""
    stride = len(rows) // size[0]
    filtered = b"".join(b"\0" + rows[i : i + stride] for i in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def decode(data: bytes, **options: Any) -> DecodedImage:
    return decode_image(data, **{"max_pixels": LIMIT, **options})


def close(actual: Pixels, expected: npt.NDArray[Any], mean: float) -> bool:
    return actual.shape == expected.shape and float(np.abs(actual.astype(float) - expected).mean()) <= mean


def fails(reason: Reason, text: str, data: bytes, **options: Any) -> SampleError:
    with pytest.raises(SampleError, match=text) as caught:
        decode(data, **options)
    assert caught.value.reason is reason, caught.value
    return caught.value


FILES = {
    "jpeg": encode(textured(40, 53), "JPEG", quality=90),
    "png": encode(textured(40, 53), "PNG"),
    "gif": encode(textured(40, 53), "GIF"),
    "webp": encode(textured(40, 53), "WEBP", lossless=True),
    "bmp": encode(textured(40, 53), "BMP"),
    "ppm": encode(textured(40, 53), "PPM"),
    "tiff": encode(textured(40, 53), "TIFF"),
    "avif": encode(textured(40, 53), "AVIF"),
    "jp2": encode(textured(40, 53), "JPEG2000"),
}


# --- What a file is -----------------------------------------------------------------------------------------


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


# --- JPEG ---------------------------------------------------------------------------------------------------


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


# --- Orientation, modes, depths -----------------------------------------------------------------------------


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


# --- Limits and hostile bytes -------------------------------------------------------------------------------


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


# --- Labels -------------------------------------------------------------------------------------------------


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


# --- Whole samples ------------------------------------------------------------------------------------------


def sample(
    size: tuple[int, int] = (60, 90), orientation: int = 1, label_size: tuple[int, int] | None = None
) -> dict[str, bytes]:
    label = np.random.default_rng(5).integers(0, 20, label_size or size).astype(np.uint8)
    return {
        "jpg": encode(gradient(*size), "JPEG", quality=95, exif=exif(orientation)),
        "seg.png": encode(label, "PNG"),
        "depth.png": encode(label.astype(np.uint16) * 100, "PNG"),
        "cls": b"3\n",
    }


ALL = ("seg", "depth", "cls")


def test_prepared_sample_is_aligned_and_complete() -> None:
    options = DecodeOptions(size=(32, 32), geometry="pad", labels=ALL, fill=(9, 8, 7))
    members = sample()
    prepared = prepare_sample(members, options)
    assert prepared.image.shape == (32, 32, 3)
    assert prepared.sha256 == hashlib.sha256(members["jpg"]).hexdigest()
    assert (prepared.decoder, prepared.orientation, prepared.flags) == ("simplejpeg", 1, ())
    assert set(prepared.labels) == set(ALL)
    seg, depth, cls = (prepared.labels[kind] for kind in ALL)
    assert [str(label.dtype) for label in (seg, depth, cls)] == ["uint8", "float32", "int64"]
    assert (seg.shape, depth.shape, cls.shape, int(cls)) == ((32, 32), (32, 32), (), 3)
    valid = prepared.valid
    assert (valid.sum(), valid.shape) == (32 * 21, (32, 32))
    assert (prepared.image[~valid] == (9, 8, 7)).all()
    assert (seg[~valid] == 255).all()
    assert np.isnan(depth[~valid]).all()
    known = valid & (seg > 0)
    np.testing.assert_allclose(depth[known], seg[known] * 0.1, rtol=1e-6)
    assert np.isnan(depth[valid & (seg == 0)]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("grid", ["displayed", "stored"])
@pytest.mark.parametrize("size", [(60, 90), (70, 70)], ids=["oblong", "square"])
def test_labels_of_a_turned_photograph(orientation: int, grid: Any, size: tuple[int, int]) -> None:
    """A class map that marks the photograph's bright-red side must mark it still."""
    stored = (gradient(*size)[:, :, 0] > 127).astype(np.uint8) + 2 * (gradient(*size)[:, :, 1] > 127)
    label = stored if grid == "stored" else orient(stored, orientation)
    members = sample(size, orientation) | {"seg.png": encode(label.astype(np.uint8), "PNG")}
    prepared = prepare_sample(
        members, DecodeOptions((40, 40), geometry="squash", labels=("seg",), label_orientation=grid)
    )
    expected = (prepared.image[:, :, 0] > 127) + 2 * (prepared.image[:, :, 1] > 127)
    assert (prepared.labels["seg"] == expected).mean() > 0.93
    assert ("label_reoriented" in prepared.flags) == (grid == "stored" and orientation > 1)
    assert prepared.orientation == orientation


@pytest.mark.parametrize("grid", ["displayed", "stored"])
def test_size_decides_the_grid_of_a_label_before_the_option_does(grid: str) -> None:
    members = sample((60, 90), 6, label_size=(60, 90) if grid == "stored" else (90, 60))
    other: Any = "displayed" if grid == "stored" else "stored"
    options = DecodeOptions((30, 20), geometry="squash", labels=("seg",), label_orientation=other)
    prepared = prepare_sample(members, options)
    label = decode_label("seg", "seg.png", members["seg.png"])
    upright = np.rot90(label, -1) if grid == "stored" else label
    np.testing.assert_array_equal(prepared.labels["seg"], apply_label(upright, prepared.transform, 255))
    assert ("label_reoriented" in prepared.flags) == (grid == "stored")


def test_scaled_decoding_changes_pixels_hardly() -> None:
    members = sample((801, 643), 6)
    scaled = prepare_sample(members, DecodeOptions((64, 48), geometry="center_crop", labels=("seg",)))
    whole = decode_image(members["jpg"], max_pixels=10**6)
    assert "dct_scaled" in scaled.flags
    assert "dct_scaled" not in whole.flags
    assert scaled.transform.source_size == whole.source_size == (643, 801)
    assert np.abs(scaled.image.astype(int) - apply_image(whole.pixels, scaled.transform)).mean() < 1


def test_first_image_extension_present_wins_whatever_its_content() -> None:
    members = {"__key__": b"a", "png": FILES["png"], "jpg": FILES["webp"], "txt": b""}
    assert prepare_sample(members, DecodeOptions((8, 8))).decoder == "pillow"
    options = DecodeOptions((8, 8), image_exts=("jpeg", "gif"))
    with pytest.raises(SampleError, match=r"no image \(jpeg, gif\) in the sample, which has jpg, png, txt") as caught:
        prepare_sample(members, options)
    assert caught.value.reason is Reason.IMAGE_MISSING


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        (
            {"seg.png": None},
            Reason.LABEL_MISSING,
            r"no seg label \(seg.png\) in the sample, which has cls, depth",
        ),
        ({"cls": None}, Reason.LABEL_MISSING, r"no cls label \(cls, cls.txt\)"),
        (
            {"seg.png": sample((30, 45))["seg.png"]},
            Reason.LABEL_SIZE,
            r"seg.png has size .* = \(30, 45\), its image \(60, 90\)",
        ),
        ({"seg.png": sample((90, 60))["seg.png"]}, Reason.LABEL_SIZE, r"\(90, 60\), its image \(60, 90\)"),
        (
            {"seg.png": encode(np.full((60, 90), 300, np.uint16), "PNG")},
            Reason.LABEL_RANGE,
            "class id 300, more than uint8 can; set seg_dtype to uint16",
        ),
        ({"jpg": FILES["jpeg"][:300]}, Reason.TRUNCATED, "jpeg cannot be decoded"),
    ],
)
def test_samples_that_cannot_be_used(changes: dict[str, bytes | None], reason: Reason, text: str) -> None:
    members = {ext: data for ext, data in (sample() | changes).items() if data is not None}
    with pytest.raises(SampleError, match=text) as caught:
        prepare_sample(members, DecodeOptions((32, 32), labels=ALL))
    assert caught.value.reason is reason


def test_labels_at_another_size_show_the_window_of_the_image() -> None:
    """The aspects differ: planning the crop for the labels alone would show another window."""
    stored = (gradient(120, 90)[:, :, 0] > 127).astype(np.uint8) + 2 * (gradient(120, 90)[:, :, 1] > 127)
    members = sample((120, 90)) | {"seg.png": encode(stored.astype(np.uint8), "PNG")}
    for geometry in get_args(Geometry):
        options = DecodeOptions((40, 60), label_size=(80, 60), geometry=geometry, labels=("seg", "cls"))
        prepared = prepare_sample(members, options)
        seg = prepared.labels["seg"]
        assert prepared.image.shape == (40, 60, 3)
        assert prepared.valid.shape == seg.shape == prepared.transform.output_size == (80, 60)
        shown = np.repeat(prepared.image, 2, axis=0)
        expected = (shown[:, :, 0] > 127) + 2 * (shown[:, :, 1] > 127)
        assert (seg == expected)[prepared.valid].mean() > 0.93


def test_seg_as_uint16() -> None:
    members = sample() | {"seg.png": encode(np.full((60, 90), 300, np.uint16), "PNG")}
    options = DecodeOptions((30, 30), geometry="pad", labels=("seg",), seg_dtype="uint16")
    seg = prepare_sample(members, options).labels["seg"]
    assert seg.dtype == np.uint16
    assert set(np.unique(seg)) == {300, 65535}
    eight_bit = prepare_sample(sample(), options).labels["seg"]
    assert eight_bit.dtype == np.uint16


# --- Photographs, where they are at hand --------------------------------------------------------------------


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

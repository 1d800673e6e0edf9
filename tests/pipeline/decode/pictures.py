"""Photographs and labels that the tests of decoding make, and checks of the decoded ones."""

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.decode.common import DecodedImage
from pipeline.decode.sample import decode_image
from pipeline.errors import Reason, SampleError

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


def many_scans(scans: int, side: int) -> bytes:
    """A legal progressive JPEG, black, of many empty scans: each is one end-of-band run over the whole image."""
    blocks = (side // 8) ** 2
    code = bytes([1] + [0] * 15)
    bits = ("0" + "1" * 14) * -(-blocks // 32767)
    bits += "1" * (-len(bits) % 8)
    run = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"".join(
        [
            b"\xff\xd8\xff\xdb\x00\x43\x00" + b"\x01" * 64,
            b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + b"\x01\x11\x00",
            b"\xff\xc4" + struct.pack(">H", 20) + b"\x00" + code + b"\x00",
            b"\xff\xc4" + struct.pack(">H", 20) + b"\x10" + code + b"\xe0",
            b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00" + bytes((blocks + 7) // 8),
            (b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + run) * (scans - 1),
            b"\xff\xd9",
        ]
    )

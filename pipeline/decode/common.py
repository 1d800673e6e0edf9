"""Parts that all image decoders use: size limits, error mapping, EXIF orientation, container checks."""

import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.decode.geometry import Size, Window
from pipeline.errors import Reason, SampleError

__all__ = [
    "ORIENTATION_TAG",
    "PILLOW_FORMATS",
    "DecodedImage",
    "as_displayed",
    "check_container",
    "check_pixels",
    "controlled",
    "exif_orientation",
    "failing_as",
    "without_png_text",
]


ORIENTATION_TAG = 274
"""EXIF and TIFF tag of the orientation."""
PILLOW_FORMATS = {
    "jpeg": ("JPEG",),
    "png": ("PNG",),
    "gif": ("GIF",),
    "webp": ("WEBP",),
    "bmp": ("BMP",),
    "tiff": ("TIFF",),
    "ppm": ("PPM",),
    "avif": ("AVIF",),
    "jp2": ("JPEG2000",),
}
"""File type, as ``sniff`` names it, to the Pillow formats that may open it; the types that are read."""
_PILLOW_LOCK = threading.RLock()


@dataclass(frozen=True)
class DecodedImage:
    """A decoded photograph.

    Attributes:
        pixels: uint8 [h, w, 3], RGB, as displayed; smaller than ``source_size`` if ``dct_scaled``.
        source_size: (height, width) as displayed, at full resolution.
        extent: (top, left, height, width), the part of ``pixels`` that shows the whole source; less than
            all of it only where a scaled JPEG ends in a part of a pixel.
        orientation: EXIF orientation in the file, 1 to 8; 1 when there is none.
        decoder: ``simplejpeg`` or ``pillow``.
        flags: special properties of the file, sorted; :mod:`pipeline.decode.sample` lists them.
    """

    pixels: npt.NDArray[np.uint8]
    source_size: Size
    extent: Window
    orientation: int
    decoder: Literal["simplejpeg", "pillow"]
    flags: tuple[str, ...]


@contextmanager
def failing_as(name: str, reason: Reason) -> Iterator[None]:
    """Turn any exception of a decoder into a SampleError that names the file type or extension ``name``."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # its own text holds nothing but a memory address
            text = "its header is damaged or cut short"
        if reason is Reason.UNDECODABLE and re.search("truncat|premature end of jpeg", text, re.IGNORECASE):
            reason = Reason.TRUNCATED
        raise SampleError(reason, f"{name} cannot be decoded: {text}; fetch or encode the file again") from error


@contextmanager
def controlled(flags: set[str]) -> Iterator[None]:
    """Run Pillow with warnings turned into the flag ``warned``, and with truncated images refused.

    Warning filters and Pillow's settings are global to the process, so they are set under a lock and restored.
    ``check_pixels`` enforces the size limit from the header; Pillow's own limit is switched off.
    """
    with _PILLOW_LOCK, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        switches = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = switches
            if caught:
                flags.add("warned")


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image or label of more than ``max_pixels`` pixels: SampleError ``TOO_LARGE``."""
    if height * width > max_pixels:
        raise SampleError(
            Reason.TOO_LARGE,
            f"(height, width) = ({height}, {width}) is {height * width} pixels by its header, more than "
            f"max_pixels = {max_pixels}; raise max_pixels if such photographs are meant to be in the data",
        )


def as_displayed(
    pixels: npt.NDArray[np.uint8],
    source_size: Size,
    extent: Window | None,
    orientation: int,
    decoder: Literal["simplejpeg", "pillow"],
    flags: set[str],
) -> DecodedImage:
    """The decoded image from pixels in displayed orientation; ``extent`` defaults to all of them."""
    if orientation > 1:
        flags.add("exif_rotated")
    return DecodedImage(
        pixels=np.ascontiguousarray(pixels),
        source_size=source_size,
        extent=extent or (0.0, 0.0, float(pixels.shape[0]), float(pixels.shape[1])),
        orientation=orientation,
        decoder=decoder,
        flags=tuple(sorted(flags)),
    )


def exif_orientation(payload: bytes, flags: set[str]) -> int:
    """The orientation, 1 to 8, in an EXIF block's first directory; 1 when it holds none or an invalid value."""
    tiff = payload.removeprefix(b"Exif\0\0")
    if not tiff:
        return 1
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    try:
        if order is None:
            raise struct.error("no TIFF header")
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == ORIENTATION_TAG:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        flags.add("warned")
    return 1


def without_png_text(data: bytes) -> bytes:
    """A PNG without the chunks of text and colour profiles, which no pixel needs and whose size Pillow limits.

    What is no sound sequence of chunks stays as it is, for the decoder to judge.
    """
    parts, at = [data[:8]], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        name, stop = data[at + 4 : at + 8], at + 12 + length
        if stop > len(data):
            parts.append(data[at:])
            break
        if name not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            parts.append(data[at:stop])
        at = stop
    return b"".join(parts)


def check_container(kind: str, data: bytes) -> None:
    """Raise ValueError where a WebP's length or a PNG's checksums show that bytes are missing or changed.

    Pillow does not verify the checksums of a PNG's pixel data.
    """
    if kind == "webp" and (declared := 8 + int.from_bytes(data[4:8], "little")) > len(data):
        raise ValueError(f"truncated: {len(data)} of {declared} bytes")
    at = 8
    while kind == "png":
        length = int.from_bytes(data[at : at + 4], "big")
        name, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            raise ValueError(f"truncated: {len(data)} bytes, in or before a chunk that ends at byte {end}")
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError(f"the checksum of chunk {name!r} at byte {at} does not match: its bytes were changed")
        if name == b"IEND":
            return
        at = end

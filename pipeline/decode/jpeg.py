"""JPEG decoding with simplejpeg (libjpeg-turbo), which reports bit errors."""

import re

import numpy as np
import simplejpeg

from pipeline.decode.common import DecodedImage, as_displayed, check_pixels, exif_orientation
from pipeline.decode.geometry import Size, orient, orient_window
from pipeline.errors import Reason, SampleError

__all__ = ["MAX_SCANS", "decode_jpeg"]


MAX_SCANS = 1000
"""Scans a JPEG may have. Encoders write about ten; a small file of thousands of empty scans decodes for minutes."""
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")


def decode_jpeg(data: bytes, max_pixels: int, min_size: Size | None, flags: set[str]) -> DecodedImage | None:
    """Decode with simplejpeg; None where Pillow must decode: CMYK, and chroma sampling that simplejpeg refuses.

    Raises:
        SampleError: too many pixels or scans, or a kind of JPEG that is not read.
        ValueError: the file is damaged.
    """
    exif, scan = _jpeg_segments(data)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        check_pixels(height, width, max_pixels)
        _check_scans(data, scan)
        if colorspace in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(data, colorspace="CMYK")  # for its bit-error check; Pillow converts the colours
            return None
        orientation = exif_orientation(exif, flags)
        scale = 1
        if min_size is not None:
            least_h, least_w = min_size[::-1] if orientation >= 5 else min_size
            scales = (n for n in (8, 4, 2) if height // n >= 2 * least_h and width // n >= 2 * least_w)
            scale = next(scales, 1)
        # libjpeg rounds a scaled size up, and simplejpeg takes the smallest not below what is asked for.
        pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale))
    except SampleError:
        raise
    except ValueError as error:
        if scan is None or data.find(b"\xff\xd9", scan) < 0:
            raise ValueError(f"truncated, {len(data)} bytes without an end-of-image marker ({error})") from error
        if "subsampling level" in str(error):
            flags.add("lenient")
            return None
        if re.search("data precision|SOF type", str(error)):
            raise SampleError(Reason.UNSUPPORTED, f"jpeg of a kind that is not read: {error}") from error
        raise
    if colorspace == "Gray":
        flags.add("grey")
    if scale > 1:
        flags.add("dct_scaled")
    extent, _ = orient_window((0.0, 0.0, height / scale, width / scale), pixels.shape[:2], orientation)
    size = Size(width, height) if orientation >= 5 else Size(height, width)
    return as_displayed(orient(pixels, orientation), size, extent, orientation, "simplejpeg", flags)


def _check_scans(data: bytes, first_scan: int | None) -> None:
    """Refuse a JPEG with more than ``MAX_SCANS`` scans."""
    # Start-of-scan markers anywhere, in metadata too, bound the number of scans from above at little cost.
    values = np.frombuffer(data, np.uint8)
    if first_scan is None or np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)) <= MAX_SCANS:
        return
    scans, at = 0, first_scan
    while (match := _MARKER.search(data, at)) and (marker := data[match.start() + 1]) != 0xD9:
        scans += marker == 0xDA
        at = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    if scans > MAX_SCANS:
        raise SampleError(
            Reason.TOO_LARGE,
            f"jpeg with {scans} scans, more than the limit of {MAX_SCANS}: it would decode for minutes and looks like "
            "a decompression bomb; encode it again if it is a photograph",
        )


def _jpeg_segments(data: bytes) -> tuple[bytes, int | None]:
    """A JPEG's EXIF payload (empty when there is none), and where its first scan begins (None: never)."""
    exif, at = b"", 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xDA:
            return exif, at  # a byte that is no marker is damage, and for the decoder to report
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD9:
            at += 1 if marker == 0xFF else 2  # padding, or a marker without a payload
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and not exif and data.startswith(b"Exif\0\0", at + 4):
            exif = data[at + 4 : end]
        at = end
    return exif, None

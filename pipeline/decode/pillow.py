"""Decoding with Pillow: every image format that simplejpeg does not decode."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.decode.common import (
    ORIENTATION_TAG,
    PILLOW_FORMATS,
    check_container,
    check_pixels,
    exif_orientation,
    without_png_text,
)
from pipeline.decode.geometry import orient
from pipeline.errors import Reason, SampleError

__all__ = ["decode_with_pillow"]

# The tag of a TIFF's picture that says whether it is a reduced version of another one in the file.
_NEW_SUBFILE_TYPE, _REDUCED = 254, 1


def decode_with_pillow(data: bytes, kind: str, max_pixels: int, flags: set[str]) -> tuple[npt.NDArray[np.uint8], int]:
    """uint8 [h, w, 3] in displayed orientation, and the file's EXIF orientation."""
    check_container(kind, data)
    if kind == "png":
        data = without_png_text(data)
    image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS[kind])
    check_pixels(image.height, image.width, max_pixels)
    if getattr(image, "is_animated", False):
        flags.add("animated")
    if kind != "tiff":
        image.load()
        # A PNG may carry its EXIF block behind the pixels.
        orientation = exif_orientation(image.info.get("exif", b""), flags)
        return orient(_to_rgb(image, kind, data, flags), orientation), orientation
    tags = _tiff_tags(image)
    if tags.get(_NEW_SUBFILE_TYPE, 0) & _REDUCED:
        raise SampleError(
            Reason.UNSUPPORTED,
            f"the first picture of this tiff is a preview ({image.height}x{image.width}), its image another one, "
            "as in a camera's raw file; develop it to JPEG, PNG or a plain TIFF",
        )
    # Pillow itself turns a TIFF while loading it, and drops the tag.
    orientation = tags.get(ORIENTATION_TAG, 1)
    pixels = _to_rgb(image, kind, data, flags)
    return pixels, orientation if orientation in range(1, 9) else 1


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def _to_rgb(image: Image.Image, kind: str, data: bytes, flags: set[str]) -> npt.NDArray[np.uint8]:
    """uint8 [h, w, 3] of a Pillow image in any mode."""
    mode, tags = image.mode, _tiff_tags(image)
    depth = data[24] if kind == "png" else max(tags.get(258, (16 if mode.startswith("I") else 8,)))
    if mode == "F" or (mode == "I" and kind != "ppm"):
        raise SampleError(
            Reason.UNSUPPORTED,
            f"{kind} with {'float' if mode == 'F' else 'signed or 32-bit'} pixels (mode {mode}) has no "
            "defined white; convert it to 8 or 16 bits",
        )
    names = {
        "1": "grey",
        "L": "grey",
        "LA": "grey",
        "I": "grey",
        "P": "palette",
        "PA": "palette",
        "CMYK": "cmyk",
    }
    if name := names.get(mode.partition(";")[0]):
        flags.add(name)
    if depth > 8:
        flags.add("sixteen_bit")
    key = image.info.get("transparency")
    if image.has_transparency_data:
        flags.add("alpha")
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        top = (1 << depth) - 1
        grey = ((values * 255 + top // 2) // top).astype(np.uint8)
        if tags.get(262) == 0:  # TIFF: white is zero
            grey = 255 - grey
        if key is not None:
            grey[values == key] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if kind == "png" and mode in ("L", "RGB") and key is not None:
        # The transparent colour is given at the file's depth, the pixels come at 8 bits.
        parts = key if mode == "RGB" else (key,)
        eight = tuple(v >> 8 if depth == 16 else v * 255 // ((1 << depth) - 1) for v in parts)
        image.info["transparency"] = eight if mode == "RGB" else eight[0]
    if image.has_transparency_data:
        upright = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", upright.size, (255, 255, 255, 255)), upright)
    return np.array(image.convert("RGB"))

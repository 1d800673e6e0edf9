"""The files of a prediction: label maps, depth maps, overlays, as bytes."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.evaluation.panels import Pixels

__all__ = ["depth_npy", "depth_png", "overlay_jpeg", "png", "seg_png"]


# Share of the prediction's colour in an overlay.
_OPACITY = 0.55


def seg_png(ids: NDArray[np.int32], colours: Pixels) -> bytes:
    """Class ids ``[h, w]`` as a PNG whose pixel values are the ids.

    Up to 255 classes it is a palette PNG in the colours uint8 ``[K, 3]``, with 255, black, where there is no prediction
    (-1). More classes give a 16-bit grey one, with 65535 there.
    """
    if len(colours) > 255:
        return png(np.where(ids < 0, 65535, ids).astype(np.uint16))
    image = Image.fromarray(np.where(ids < 0, 255, ids).astype(np.uint8))
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = colours
    image.putpalette(palette.tobytes())
    return _encoded(image, "PNG")


def depth_png(metres: NDArray[np.float32]) -> bytes:
    """Depth ``[h, w]`` as a 16-bit grey PNG in millimetres, 1 to 65535; 0 where there is no prediction (NaN)."""
    millimetres = np.where(np.isnan(metres), 0, np.clip(np.round(1000 * metres), 1, 65535))
    return png(millimetres.astype(np.uint16))


def depth_npy(metres: NDArray[np.float32]) -> bytes:
    """Depth ``[h, w]`` as a NumPy file: float32 metres, as predicted; NaN where there is no prediction."""
    file = io.BytesIO()
    np.save(file, metres.astype(np.float32))
    return file.getvalue()


def overlay_jpeg(photograph: Pixels, colours: Pixels, predicted: NDArray[np.bool_]) -> bytes:
    """The colours of a prediction over a photograph, both uint8 ``[h, w, 3]``, where there is one, bool ``[h, w]``."""
    below = Image.fromarray(photograph)
    mixed = Image.blend(below, Image.fromarray(colours), _OPACITY)
    return _encoded(Image.composite(mixed, below, Image.fromarray(predicted)), "JPEG", quality=90)


def png(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """uint8 ``[h, w, 3]`` or ``[h, w]``, or uint16 ``[h, w]``."""
    return _encoded(Image.fromarray(pixels), "PNG")


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()

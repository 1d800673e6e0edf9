"""Geometric transforms: which window of a photograph lands in which window of the output.

An image and its labels go through one ``Transform``, so they stay aligned whatever their sampling is.
Coordinates are continuous: pixel ``i`` covers ``[i, i + 1)`` and its centre lies at ``i + 0.5``.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.options import Size

__all__ = [
    "Geometry",
    "Size",
    "Transform",
    "Window",
    "apply_image",
    "apply_label",
    "orient",
    "orient_window",
    "plan_transform",
    "valid_mask",
]


Geometry: TypeAlias = Literal["squash", "center_crop", "pad"]
Window: TypeAlias = tuple[float, float, float, float]
Scalar = TypeVar("Scalar", bound=np.generic)
# EXIF orientation -> from the stored grid to the displayed one: transpose, then flip rows, flip columns.
_ORIENT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class Transform:
    """One window of the source, resampled into one window of the output.

    Attributes:
        source_size: (height, width) of the photograph as displayed, at its full resolution.
        source_window: (top, left, height, width) in source pixels; may fall between pixels.
        output_size: (height, width) of the result.
        output_window: (top, left, height, width) in output pixels; what lies outside is padding.

    Raises:
        ConfigError: a size is not positive, or a window is empty or reaches out of its grid.
    """

    source_size: Size
    source_window: Window
    output_size: Size
    output_window: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        for name, size, window in (
            ("source", self.source_size, self.source_window),
            ("output", self.output_size, self.output_window),
        ):
            top, left, height, width = window
            # A centred window's sides are quotients: their sum may pass the edge by a rounding error.
            margins = (top, left, size[0] - top - height, size[1] - left - width)
            inside = all(margin >= -1e-9 * max(size) for margin in margins)
            if not (inside and min(*size, height, width) > 0):
                raise ConfigError(
                    f"{name} window (top, left, height, width) = {window} does not lie inside the {name} "
                    f"size (height, width) = {size}: both must be positive, the window within the size"
                )

    def resized(self, output_size: Size) -> "Transform":
        """The same view at another output size: what the whole output, stretched to that size, would show.

        The window's edges are rounded to whole pixels, so they move by half an output pixel at most.
        """
        top, left, height, width = self.output_window
        first, last = [], []
        for start, length, old, new in (
            (top, height, self.output_size[0], output_size[0]),
            (left, width, self.output_size[1], output_size[1]),
        ):
            edges = [(2 * edge * new + old) // (2 * old) for edge in (start, start + length)]
            first.append(min(edges[0], new - 1))
            last.append(max(edges[1], first[-1] + 1))
        window = (first[0], first[1], last[0] - first[0], last[1] - first[1])
        return Transform(self.source_size, self.source_window, output_size, window)

    def to_row(self) -> dict[str, list[float]]:
        """A plain dict of lists of numbers, which survives JSON exactly."""
        return {name: list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Transform":
        """The transform that ``to_row`` gave ``row`` for; ConfigError when it is not such a row."""
        try:
            (h, w), (top, left, height, width) = row["source_size"], row["source_window"]
            (H, W), (y, x, rows, columns) = row["output_size"], row["output_window"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a row of a Transform: {row!r}; expected what Transform.to_row gives") from error
        return cls(
            Size(int(h), int(w)),
            (float(top), float(left), float(height), float(width)),
            Size(int(H), int(W)),
            (int(y), int(x), int(rows), int(columns)),
        )


def plan_transform(kind: Geometry, source_size: Size, output_size: Size) -> Transform:
    """Which part of a source of any size goes where in the output.

    Args:
        kind: ``squash``: the whole source onto the whole output, whatever its aspect. ``center_crop``: the
            largest centred window with the output's aspect (timm's evaluation with ``crop_pct=1``, without
            its rounding to whole pixels). ``pad``: the whole source, as large as fits, centred; its longer
            relative side fills the output, the other is rounded to whole pixels, at least one.
        source_size: (height, width) as displayed.
        output_size: (height, width).

    Raises:
        ConfigError: an unknown kind or a size that is not positive.
    """
    (h, w), (H, W) = source_size, output_size
    if kind not in get_args(Geometry):
        raise ConfigError(f"unknown geometry {kind!r}; choose one of {', '.join(get_args(Geometry))}")
    if min(h, w, H, W) < 1:
        raise ConfigError(f"sizes must be positive, got source (height, width) = {source_size}, output = {output_size}")
    source: Window = (0.0, 0.0, float(h), float(w))
    output = (0, 0, H, W)
    wide = w * H > h * W  # the source is relatively wider than the output
    if kind == "center_crop":
        height, width = (float(h), h * W / H) if wide else (w * H / W, float(w))
        source = ((h - height) / 2, (w - width) / 2, height, width)
    elif kind == "pad":
        rows, columns = (max(1, (2 * h * W + w) // (2 * w)), W) if wide else (H, max(1, (2 * w * H + h) // (2 * h)))
        output = ((H - rows) // 2, (W - columns) // 2, rows, columns)
    return Transform(Size(h, w), source, Size(H, W), output)


def apply_image(
    image: npt.NDArray[np.uint8] | Image.Image,
    transform: Transform,
    fill: tuple[int, int, int] = (0, 0, 0),
    extent: Window | None = None,
) -> npt.NDArray[np.uint8]:
    """Resample an image once, by antialiased bicubic interpolation.

    Args:
        image: uint8 [h, w, 3], or an RGB Pillow image. It may be smaller than ``transform.source_size``:
            the decoder of JPEG can deliver a half, a quarter or an eighth.
        transform: in pixels of the full-resolution source.
        fill: (r, g, b) of the padding.
        extent: (top, left, height, width), the part of ``image``, in its own pixels, that shows the whole
            source; default all of it. A scaled JPEG ends in a part of a pixel when its size does not divide.

    Returns:
        uint8 [H, W, 3], writeable and contiguous.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    if image.mode != "RGB":
        raise ConfigError(f"an image must be RGB, uint8 [h, w, 3], got mode {image.mode}; convert it before")
    first_row, first_column, rows, columns = extent or (0.0, 0.0, float(image.height), float(image.width))
    (h, w), (top, left, height, width) = transform.source_size, transform.source_window
    y, x = rows / h, columns / w
    box = (
        first_column + left * x,
        first_row + top * y,
        first_column + (left + width) * x,
        first_row + (top + height) * y,
    )
    out_top, out_left, out_h, out_w = transform.output_window
    pixels = np.array(image.resize((out_w, out_h), Image.Resampling.BICUBIC, box=box))
    if (out_h, out_w) == transform.output_size:
        return pixels
    out = np.empty((*transform.output_size, 3), np.uint8)
    out[:] = fill
    out[out_top : out_top + out_h, out_left : out_left + out_w] = pixels
    return out


def apply_label(label: npt.NDArray[Scalar], transform: Transform, fill: float) -> npt.NDArray[Scalar]:
    """Take, for each output pixel, the label under its centre.

    Args:
        label: [h, w] of any dtype, at the full ``transform.source_size``.
        transform: the image's own.
        fill: the value of the padding.

    Returns:
        [H, W] of the label's dtype; no value that was not in ``label`` or ``fill`` ever appears.

    Raises:
        ConfigError: the label has another size than the source.
    """
    if label.shape != transform.source_size:
        raise ConfigError(f"label of shape {label.shape} does not fit a source of size {tuple(transform.source_size)}")
    top, left, height, width = transform.source_window
    out_top, out_left, out_h, out_w = transform.output_window
    rows = _nearest(top, height, out_h, transform.source_size[0])
    columns = _nearest(left, width, out_w, transform.source_size[1])
    if (out_h, out_w) == transform.output_size:
        return label[rows[:, None], columns]
    out = np.full(transform.output_size, fill, label.dtype)
    out[out_top : out_top + out_h, out_left : out_left + out_w] = label[rows[:, None], columns]
    return out


def valid_mask(transform: Transform) -> npt.NDArray[np.bool_]:
    """Bool [H, W]: True where the output shows the source, False where it is padding."""
    top, left, height, width = transform.output_window
    mask = np.zeros(transform.output_size, np.bool_)
    mask[top : top + height, left : left + width] = True
    return mask


def orient(array: npt.NDArray[Scalar], orientation: int) -> npt.NDArray[Scalar]:
    """Turn [h, w, ...] from the stored pixel grid into the displayed one; a view.

    Args:
        array: image or label, as the file stores it.
        orientation: EXIF orientation, 1 to 8.
    """
    transpose, flip_rows, flip_columns = _ORIENT[orientation]
    if transpose:
        array = array.swapaxes(0, 1)
    return array[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def orient_window(window: Window, size: Size, orientation: int) -> tuple[Window, Size]:
    """Where a window of a grid of this stored size lies after ``orient``, and the turned size."""
    transpose, flip_rows, flip_columns = _ORIENT[orientation]
    top, left, height, width = window
    if transpose:
        top, left, height, width, size = left, top, width, height, Size(size[1], size[0])
    if flip_rows:
        top = size[0] - top - height
    if flip_columns:
        left = size[1] - left - width
    return (top, left, height, width), size


def _nearest(start: float, length: float, count: int, limit: int) -> npt.NDArray[np.intp]:
    """Source indices under the centres of ``count`` output pixels that share ``length`` source pixels."""
    centres = start + (np.arange(count) + 0.5) * (length / count)
    return np.minimum(centres.astype(np.intp), limit - 1)

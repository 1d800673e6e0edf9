"""Jittered views of an image: sampled, applied to maps, and applied to positions (FeatUp, section 3).

Small pads, zooms, crops and flips move an image against the grid of its backbone. The coarse features of a view thus
depend on the image between the grid's points, and high-resolution features must explain those of all views.

A view is computed in four steps, in this order: the image is padded by ``max_pad`` pixels on every side (by reflection,
the border pixel not repeated), zoomed (bilinear), cropped to its own size again, and flipped left to right. All four
act on rows and columns separately, so a view is a table of taps along the height and one along the width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.kernels.resample import Taps, resample

__all__ = ["Jitter", "View", "check_view", "from_view", "reflect", "to_image", "to_view", "to_view_axis", "warp"]


@dataclass(frozen=True)
class View:
    """A zoom, a crop and a flip of a padded image.

    Attributes:
        zoom: Factor, at least 1.
        top, left: Where the crop begins, in pixels of the padded and zoomed image, at least 0.
        flip: Whether the crop is then mirrored left to right.

    Raises:
        GeometryError: a zoom below 1 or not finite, or a crop that begins before the first pixel.
    """

    zoom: float
    top: int
    left: int
    flip: bool

    def __post_init__(self) -> None:
        if not (isfinite(self.zoom) and self.zoom >= 1):
            raise GeometryError(
                f"view: zoom={self.zoom} must be a finite number of at least 1; below 1 it would only show more of the "
                "reflected border, which max_pad sets"
            )
        if self.top < 0 or self.left < 0:
            raise GeometryError(
                f"view: the crop begins at (top, left) = ({self.top}, {self.left}); both count from the first pixel of "
                "the padded, zoomed image and cannot be negative"
            )


@dataclass(frozen=True)
class Jitter:
    """A distribution of views.

    Attributes:
        max_pad: Pixels of reflected border on every side, at least 0: the largest shift of a view that is not zoomed.
        zoom: (least, largest) zoom, both at least 1.
        flip: Whether half of the views are mirrored.
        zoom_share: Share of the views that are zoomed, in [0, 1]; the others keep zoom 1.

    Raises:
        GeometryError: a negative pad, zooms that are not finite, below 1, or in the wrong order, or a share that is
            none.
    """

    max_pad: int = 20
    zoom: tuple[float, float] = (1.0, 1.8)
    flip: bool = True
    zoom_share: float = 1.0

    def __post_init__(self) -> None:
        if self.max_pad < 0:
            raise GeometryError(f"jitter: max_pad={self.max_pad} must be 0 pixels or more")
        least, largest = self.zoom
        if not (isfinite(largest) and 1 <= least <= largest):
            raise GeometryError(
                f"jitter: zoom={self.zoom} must be (least, largest), both finite and at least 1; "
                "give (1.0, 1.0) for views that are not zoomed"
            )
        if not 0 <= self.zoom_share <= 1:
            raise GeometryError(f"jitter: zoom_share={self.zoom_share} is a share of the views, from 0 to 1")

    @property
    def identity(self) -> View:
        """The view that is the image itself."""
        return View(zoom=1.0, top=self.max_pad, left=self.max_pad, flip=False)

    def sample(
        self, count: int, size: tuple[int, int], generator: torch.Generator, identity_first: bool = False
    ) -> list[View]:
        """Sample views: zoom uniform in its range or 1, crop uniform over where it fits, flip with probability 1/2.

        Args:
            count: Number of views, at least 0.
            size: (height, width) of the image, in pixels.
            generator: The only source of chance: equal states give equal lists. Its device does not matter.
            identity_first: Whether to replace the first view by :attr:`identity`; the others stay the same.

        Raises:
            GeometryError: a negative count, or an image without pixels.
        """
        if count < 0 or min(size) < 1:
            raise GeometryError(f"jitter: cannot sample {count} views of an image of {size} (height, width)")
        least, largest = self.zoom
        # Always four numbers a view, so that, for instance, the crops do not depend on whether views are flipped.
        uniform = torch.rand(count, 4, generator=generator, device=generator.device, dtype=torch.float64)
        views = []
        for for_zoom, for_top, for_left, for_flip in uniform.tolist():
            zoomed = for_zoom < self.zoom_share
            zoom = least + (largest - least) * for_zoom / self.zoom_share if zoomed else 1.0
            down, across = (_room(side, zoom, self.max_pad) + 1 for side in size)
            views.append(View(zoom, floor(for_top * down), floor(for_left * across), self.flip and for_flip < 0.5))
        if identity_first and views:
            views[0] = self.identity
        return views


def warp(
    maps: Tensor,
    views: Sequence[View],
    max_pad: int,
    size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """Warp each image or feature map by its own view; differentiable with respect to the maps.

    A map may have another resolution than the image that the view was sampled for. Its positions are then scaled to
    the image's, so that pixels and features stay aligned. No low-pass filter is applied: a result much smaller than
    its input aliases.

    Args:
        maps: ``[B, h, w, C]``, floating.
        views: One for each map.
        max_pad: Of the jitter that the views were sampled from, in pixels of the image.
        size: (height, width) of the result; by default that of the maps.
        image_size: (height, width) of the image, in pixels; by default that of the maps.

    Returns:
        ``[B, *size, C]``.

    Raises:
        GeometryError: maps that are not floating, not as many as there are views, or a view that reaches beyond the
            padded image.
    """
    if maps.dim() != 4 or len(maps) != len(views) or not maps.is_floating_point():
        raise GeometryError(
            f"warp: need floating maps [B, h, w, C] and one view for each, got {maps.dtype} {tuple(maps.shape)} and "
            f"{len(views)} views; expand an image along the batch for many views of it"
        )
    map_size = (maps.shape[1], maps.shape[2])
    height, width = image_size or map_size
    out_height, out_width = size or map_size
    warped = []
    for index, view in enumerate(views):
        check_view(view, (height, width), max_pad)
        rows = _view_taps(map_size[0], height, out_height, view.zoom, view.top, False, max_pad)
        cols = _view_taps(map_size[1], width, out_width, view.zoom, view.left, view.flip, max_pad)
        warped.append(resample(maps[index : index + 1], rows, cols))
    return torch.cat(warped) if warped else maps.new_empty(0, out_height, out_width, maps.shape[3])


def to_image(view: View, positions: Tensor, size: tuple[int, int], max_pad: int) -> Tensor:
    """Map positions in a view to positions in the image.

    Positions in the padded border map to their reflections inside the image, so two positions may map to one.

    Args:
        positions: Floating ``[..., 2]``, (row, column) in the view, in pixels; whole numbers are pixel centres.
        size: (height, width) of the image, and so of the view.
        max_pad: Of the jitter that the view was sampled from.

    Returns:
        ``[..., 2]`` in pixels of the image, within ``[0, height - 1]`` and ``[0, width - 1]``.

    Raises:
        GeometryError: positions that are not pairs, or a view that reaches beyond the padded image.
    """
    row, column = _split_positions(view, positions, size, max_pad)
    if view.flip:
        column = size[1] - 1 - column
    return torch.stack(
        [
            from_view(row, size[0], view.zoom, view.top, max_pad),
            from_view(column, size[1], view.zoom, view.left, max_pad),
        ],
        -1,
    )


def to_view(view: View, positions: Tensor, size: tuple[int, int], max_pad: int) -> tuple[Tensor, Tensor]:
    """Map positions in the image to positions in a view, reflections ignored: the inverse of :func:`to_image`.

    Args:
        positions: Floating ``[..., 2]``, (row, column) in the image, in pixels; whole numbers are pixel centres.
        size: (height, width) of the image, and so of the view.
        max_pad: Of the jitter that the view was sampled from.

    Returns:
        ``[..., 2]`` in pixels of the view, also outside of it, and a boolean ``[...]``: whether the position lies
        within the area of the view's pixels.

    Raises:
        GeometryError: positions that are not pairs, or a view that reaches beyond the padded image.
    """
    row, column = _split_positions(view, positions, size, max_pad)
    row, row_inside = to_view_axis(row, size[0], view.zoom, view.top, False, max_pad)
    column, column_inside = to_view_axis(column, size[1], view.zoom, view.left, view.flip, max_pad)
    return torch.stack([row, column], -1), row_inside & column_inside


def from_view(at: Tensor, side: int, zoom: float | Tensor, offset: int | Tensor, max_pad: int) -> Tensor:
    """Positions along one axis of a view, before its flip, to positions along the image's; see :func:`to_image`.

    Args:
        at: Of any shape, in pixels of the view.
        side: Of the image, in pixels.
        zoom, offset: Of the view, where the offset is its ``top`` or ``left``; or a tensor, for a view per position.
        max_pad: Of the jitter that the view was sampled from.

    Returns:
        Of the shape of ``at``, within ``[0, side - 1]``.
    """
    padded = ((at + offset + 0.5) / zoom - 0.5).clamp(0, side + 2 * max_pad - 1)
    return reflect(padded - max_pad, side)


def reflect(positions: Tensor, size: int) -> Tensor:
    """Positions along an axis, whole or fractional, reflected into ``[0, size - 1]`` at its ends.

    The end positions are not repeated. Positions far outside are reflected several times. On an axis of one position
    every position maps to 0.
    """
    if size == 1:
        return torch.zeros_like(positions)
    period = 2 * (size - 1)
    positions = positions.remainder(period)
    return torch.where(positions <= size - 1, positions, period - positions)


def _room(side: int, zoom: float, max_pad: int) -> int:
    """Pixels by which a crop of ``side`` can be moved in the padded, zoomed axis."""
    return floor((side + 2 * max_pad) * zoom) - side


def to_view_axis(at: Tensor, side: int, zoom: float, offset: int, flip: bool, max_pad: int) -> tuple[Tensor, Tensor]:
    """Positions along one axis of the image to the view's, and whether these lie within the area of its pixels."""
    at = (at + max_pad + 0.5) * zoom - 0.5 - offset
    if flip:
        at = side - 1 - at
    return at, (at >= -0.5) & (at < side - 0.5)


def _view_taps(length: int, side: int, out: int, zoom: float, offset: int, flip: bool, max_pad: int) -> Taps:
    """Taps into an axis of ``length`` positions that spans an image of ``side`` pixels, for ``out`` positions."""
    at = (torch.arange(out, dtype=torch.float64) + 0.5) * (side / out) - 0.5
    if flip:
        at = at.flip(0)
    place = (from_view(at, side, zoom, offset, max_pad) + 0.5) * (length / side) - 0.5
    place = place.clamp(0, length - 1)
    first = place.floor()
    t = place - first
    index = torch.stack([first, first + 1], 1).long().clamp_max(length - 1)
    return Taps(index, torch.stack([1 - t, t], 1).float(), length)


def _split_positions(view: View, positions: Tensor, size: tuple[int, int], max_pad: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of positions in a view, checked."""
    if positions.shape[-1:] != (2,) or not positions.is_floating_point():
        raise GeometryError(
            f"view: positions must be floating [..., 2], (row, column), got {positions.dtype} {tuple(positions.shape)}"
        )
    check_view(view, size, max_pad)
    return positions[..., 0], positions[..., 1]


def check_view(view: View, size: tuple[int, int], max_pad: int) -> None:
    """Raise :class:`GeometryError` for a view that reaches beyond an image of ``size`` padded by ``max_pad``."""
    down, across = (_room(side, view.zoom, max_pad) for side in size)
    if view.top > down or view.left > across:
        raise GeometryError(
            f"{view} reaches beyond an image of {size} (height, width) padded by {max_pad}: there, top is at most "
            f"{down} and left at most {across}; give the image's size and the max_pad that it was sampled for"
        )

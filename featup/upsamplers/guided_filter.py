"""The guided filter (He, Sun and Tang, Guided Image Filtering, ECCV 2010): bilinear features, filtered by the image."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.resample import interpolation_taps, resample
from featup.upsamplers.base import Upsampler, as_guidance, row_slices
from featup.upsamplers.joint import resize_guidance

__all__ = ["GuidedFilter"]


class GuidedFilter(Upsampler):
    """In every window the features are a ridge regression on the image's colours; overlapping windows are averaged.

    The features are first interpolated bilinearly. A window is cut off at the border of the image. The filter needs no
    training, is linear over space for a given image, and keeps constant features.
    """

    name = "guided_filter"

    def __init__(self, radius: int = 16, epsilon: float = 0.01) -> None:
        """
        Args:
            radius: The window is ``2 * radius + 1`` positions of the result wide and high. It must span several coarse
                cells; within one, interpolated features hold nothing that colours could explain.
            epsilon: Ridge penalty on the coefficients of colours in [0, 1], above 0: windows whose colours vary less
                than this (0.01 is a standard deviation of 25 grey levels of 255) are smoothed. Radius and penalty are
                the pair that He et al. use for detail.

        Raises:
            GeometryError: a radius below one, or a penalty that is not positive.
        """
        super().__init__()
        if radius < 1 or epsilon <= 0:
            raise GeometryError(
                f"guided_filter: radius={radius} must be at least 1 and epsilon={epsilon} must be positive; without a "
                "penalty, windows of one colour have no solution"
            )
        self.radius = radius
        self.epsilon = epsilon

    def row_tiles(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.row_tiles`."""
        # Around zero the products of colours and features keep more digits.
        image = resize_guidance(as_guidance(guidance, features.dtype), size) - 0.5
        down = interpolation_taps("bilinear", features.shape[1], size[0])
        across = interpolation_taps("bilinear", features.shape[2], size[1])
        # Large tiles, because each also computes the coefficients of the windows above and below it.
        for rows in row_slices(size, 8 * self.radius * size[1], features.device):
            windows = _widened(rows, self.radius, size[0])
            reach = _widened(rows, 2 * self.radius, size[0])
            coefficients = self._coefficients(image[:, reach], resample(features, down[reach], across))
            within = slice(windows.start - reach.start, windows.stop - reach.start)
            means = _box_means(coefficients[:, within], self.radius)
            means = means[:, rows.start - windows.start : rows.stop - windows.start]
            yield rows, means[..., 0, :] + (image[:, rows, :, :, None] * means[..., 1:, :]).sum(3)

    def _coefficients(self, colours: Tensor, values: Tensor) -> Tensor:
        """The regression around every position of ``[1, H, W, 3]`` and ``[1, H, W, K]``: ``[1, H, W, 4, K]``.

        The intercept comes first, then the coefficients of the colours.
        """
        means = _box_means(colours, self.radius)
        products = _box_means(colours[..., :, None] * colours[..., None, :], self.radius)
        penalty = self.epsilon * torch.eye(3, dtype=colours.dtype, device=colours.device)
        covariance = products - means[..., :, None] * means[..., None, :] + penalty
        moments = _box_means(
            torch.cat([values[..., None, :], colours[..., :, None] * values[..., None, :]], 3), self.radius
        )
        slopes = torch.linalg.inv(covariance) @ (moments[..., 1:, :] - means[..., :, None] * moments[..., :1, :])
        intercept = moments[..., :1, :] - (means[..., :, None] * slopes).sum(3, keepdim=True)
        return torch.cat([intercept, slopes], 3)


def _widened(rows: slice, reach: int, height: int) -> slice:
    return slice(max(0, rows.start - reach), min(height, rows.stop + reach))


def _box_means(maps: Tensor, radius: int) -> Tensor:
    """Means of ``[1, H, W, ...]`` over the window around every position, cut off at the border."""
    for axis in (1, 2):
        size = maps.shape[axis]
        at = torch.arange(size, device=maps.device)
        first, stop = (at - radius).clamp_min(0), (at + radius + 1).clamp_max(size)
        # From running sums, so that the radius costs nothing; a zero comes before the first.
        sums = functional.pad(maps.cumsum(axis), [0, 0] * (maps.dim() - axis - 1) + [1, 0])
        counts = (stop - first).view(-1, *[1] * (maps.dim() - axis - 1))
        maps = (sums.index_select(axis, stop) - sums.index_select(axis, first)) / counts
    return maps

"""Downsamplers: from high-resolution features to the coarse features of the backbone (FeatUp, section 3.1).

A downsampler is a small model of how the backbone summarises a patch: each cell of the coarse grid is a weighted mean
over a window of the high-resolution map, with the same weights for all channels. It therefore commutes with any
projection of the channels. Training downsamples a few random projections, with the weights from one more channel, and
never needs all channels at high resolution.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from featup.errors import GeometryError
from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import Taps, resample
from featup.multiview.views import reflect
from featup.upsamplers.base import ChannelMap

__all__ = ["AttentionDownsampler", "BlurDownsampler", "Padding", "gaussian_blur"]


Padding = Literal["reflect", "valid"]
_BLUR_SIGMA = 1.0
_BLUR_RADIUS = 2


class _Downsampler(nn.Module):
    """The geometry of the windows, which both downsamplers share."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int], padding: Padding, blur: bool) -> None:
        super().__init__()
        if min(*kernel, *stride) < 1:
            raise GeometryError(
                f"downsampler: kernel={kernel} and stride={stride} (height, width) must be at least 1; "
                "take the stride from the backbone"
            )
        if padding not in ("reflect", "valid"):
            raise GeometryError(f"downsampler: unknown padding {padding!r}; there are 'reflect' and 'valid'")
        self.kernel = kernel
        self.stride = stride
        self.padding = padding
        self.blur = blur

    def extra_repr(self) -> str:
        """The geometry, in one line."""
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding!r}, blur={self.blur}"

    def windowed(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[B, H, W, C]``, blurred, and padded or cropped to the positions that the windows of ``grid`` cover."""
        size = (values.shape[1], values.shape[2])
        rows, cols = (self._taps(size, grid, axis) for axis in (0, 1))
        if not self.blur and all(torch.equal(t.index[:, 0], torch.arange(t.size)) for t in (rows, cols)):
            return values
        return resample(values, rows, cols)

    def _taps(self, size: tuple[int, int], grid: tuple[int, int], axis: int) -> Taps:
        kernel, stride = self.kernel[axis], self.stride[axis]
        needed = (grid[axis] - 1) * stride + kernel
        fits = needed <= size[axis] if self.padding == "valid" else grid[axis] * stride == size[axis]
        if not fits or grid[axis] < 1:
            raise GeometryError(
                f"downsampler: a map of {size} does not give a grid of {grid} (both height, width) with kernel "
                f"{self.kernel}, stride {self.stride} and padding {self.padding!r}; 'reflect' needs a map of grid x "
                "stride, 'valid' one of at least (grid - 1) x stride + kernel"
            )
        start = 0 if self.padding == "valid" else (stride - kernel) // 2
        at = reflect(torch.arange(start, start + needed), size[axis])[:, None]
        if not self.blur:
            return Taps(at, torch.ones(at.shape), size[axis])
        return _blur_taps(at, size[axis])


def gaussian_blur(values: Tensor) -> Tensor:
    """``[B, H, W, C]`` smoothed by a Gaussian with a sigma of one position, 5 taps wide, over a reflected border."""
    rows, cols = (_blur_taps(torch.arange(side)[:, None], side) for side in values.shape[1:3])
    return resample(values, rows, cols)


def _blur_taps(at: Tensor, side: int) -> Taps:
    """Taps of the Gaussian at positions ``[N, 1]`` of an axis."""
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    weight = (-offsets.square() / (2 * _BLUR_SIGMA**2)).softmax(0)
    return Taps(reflect(at + offsets, side), weight.expand(len(at), -1), side)


class BlurDownsampler(_Downsampler):
    """The same learned kernel for every cell, positive and of sum one."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int], padding: Padding = "reflect") -> None:
        """
        Args:
            kernel: (height, width) of the window, in positions of the high-resolution map.
            stride: (height, width) of a cell, likewise: the backbone's stride on a map of the image's size.
            padding: ``reflect``: the window of cell (i, j) is centred on its patch, rows ``i * stride[0]`` to
                ``(i + 1) * stride[0]`` and columns likewise (where the two cannot share a centre, half a position
                above and to the left of it), and the map is reflected at its border. A kernel of the stride's size
                needs no reflection. ``valid``: the first window begins at the first position, nothing is padded, and
                positions after the last window are not read.

        Raises:
            GeometryError: a kernel or stride below one, or an unknown padding.
        """
        super().__init__(kernel, stride, padding, blur=False)
        self.weight = nn.Parameter(torch.ones(kernel))

    def forward(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """
        Args:
            values: ``[B, H, W, P]``: features, or any projection of them.
            grid: (height, width) of the result, in cells.

        Returns:
            ``[B, *grid, P]``.

        Raises:
            GeometryError: a map that does not give this grid.
        """
        filters = self.weight.abs() / self.weight.abs().sum()
        return adaptive_conv(self.windowed(values, grid), filters.expand(len(values), *grid, -1, -1), self.stride)


class AttentionDownsampler(_Downsampler):
    """Each cell attends within its window: its weights are a softmax of logits that the features predict.

    A linear map predicts the logit of every position. A cell's weights are ``softmax(scale * logits + bias)`` over its
    window, with ``scale`` and ``bias`` learned per tap (FeatUp, section 3.1). As in the original, logits and values
    are first smoothed by a Gaussian with a sigma of one position.
    """

    def __init__(
        self,
        channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dropout: float = 0.2,
        padding: Padding = "reflect",
        blur: bool = True,
    ) -> None:
        """
        Args:
            channels: C of the features.
            kernel, stride, padding: See :class:`BlurDownsampler`.
            dropout: Probability that an entry of the features is dropped from its logit in training, in [0, 1).
            blur: Whether to smooth first. Without it, and with kernel and stride alike, the values are not copied.

        Raises:
            GeometryError: a kernel or stride below one, an unknown padding, or a dropout outside [0, 1).
        """
        super().__init__(kernel, stride, padding, blur)
        if not 0 <= dropout < 1:
            raise GeometryError(f"downsampler: dropout={dropout} must be at least 0 and below 1")
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.Linear(channels, 1)
        self.scale = nn.Parameter(torch.ones(kernel))
        self.bias = nn.Parameter(torch.zeros(kernel))

    @property
    def logit_projection(self) -> ChannelMap:
        """The linear map ``C -> 1`` behind :meth:`logit_map`, without dropout: ``weight [1, C]``, ``bias [1]``."""
        return ChannelMap(self.attention.weight, self.attention.bias)

    def logit_map(self, features: Tensor) -> Tensor:
        """``[B, H, W, C]`` to the logits ``[B, H, W, 1]``, at whatever resolution the features have.

        In training, dropout applies to the features. If the upsampler is linear over space, the logits of the coarse
        features may be upsampled instead, with their bias added afterwards where the upsampler's weights do not sum to
        one. Dropout then applies to whole coarse cells.
        """
        dropped: Tensor = self.dropout(features)
        return nn.functional.linear(dropped, self.attention.weight, self.attention.bias)

    def sample_logit_weight(self, rate: float, generator: torch.Generator) -> Tensor:
        """The weight of :attr:`logit_projection` with dropout of whole channels, ``[1, C]``.

        The same channels are dropped at all positions, or the logits would not be a projection of the features.

        Args:
            rate: Probability that a channel is dropped, in [0, 1).
            generator: The only source of chance.
        """
        weight = self.attention.weight
        kept = torch.rand(weight.shape, generator=generator) >= rate
        return weight * kept.to(weight) / (1 - rate)

    @torch.no_grad()
    def perturb_taps(self, generator: torch.Generator | None = None) -> None:
        """Add the original's initial noise, of standard deviation 0.01, to :attr:`scale` and :attr:`bias`.

        Args:
            generator: The source of chance; by default torch's own.
        """
        for taps in (self.scale, self.bias):
            taps.add_(0.01 * torch.randn(taps.shape, generator=generator).to(taps))

    def sample_kept(self, rate: float, generator: torch.Generator, *shape: int) -> Tensor:
        """1 for cells whose logits count in a step, 0 for those that are dropped, ``[*shape]``, on the CPU.

        Args:
            rate: Probability that a cell is dropped, in [0, 1).
            generator: The only source of chance.
            shape: Of the result.
        """
        return (torch.rand(shape, generator=generator) >= rate).to(self.scale.dtype)

    def filters(self, logits: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """The attention of each cell: ``[B, H, W, 1]`` to ``[B, *grid, *kernel]``, which sums to one per cell.

        ``kept`` ``[B, *grid]`` is 0 for cells whose logits are dropped, which leaves them the biases of the taps.
        """
        placed = self.windowed(logits, grid).squeeze(-1)
        windows = placed.unfold(1, self.kernel[0], self.stride[0]).unfold(2, self.kernel[1], self.stride[1])
        if kept is not None:
            windows = windows * kept[..., None, None]
        scored = windows * self.scale + self.bias
        return scored.flatten(-2).softmax(-1).view_as(scored)

    def forward(self, values: Tensor, logits: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """
        Args:
            values: ``[B, H, W, P]``: features, or any projection of them.
            logits: ``[B, H, W, 1]``: :meth:`logit_map` of the features, or the same channel upsampled with the values.
            grid: (height, width) of the result, in cells.
            kept: See :meth:`filters`.

        Returns:
            ``[B, *grid, P]``.

        Raises:
            GeometryError: values and logits of different maps, or a map that does not give this grid.
        """
        if values.dim() != 4 or tuple(logits.shape) != (*values.shape[:3], 1):
            raise GeometryError(
                f"downsampler: need values [B, H, W, P] and their logits [B, H, W, 1], got {tuple(values.shape)} and "
                f"{tuple(logits.shape)}; logit_map computes them from the features"
            )
        return adaptive_conv(self.windowed(values, grid), self.filters(logits, grid, kept), self.stride)

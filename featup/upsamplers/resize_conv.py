"""Resize-convolution: interpolate, then convolve (Odena et al., 2016).

A trained baseline of FeatUp (section 4).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.kernels.resample import interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, row_slices
from featup.upsamplers.learned import LearnedUpsampler, fold_into

__all__ = ["ResizeConv"]


class _ResizeStage(nn.Module):
    """The convolution after an interpolation, as a residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3)
        self.mix = nn.Linear(width, width)

    def forward(self, padded: Tensor) -> Tensor:
        """``[1, H + 2, W + 2, width]``, interpolated and padded, to ``[1, H, W, width]``."""
        spread = self.spread(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed: Tensor = self.mix(functional.gelu(spread))
        return padded[:, 1:-1, 1:-1] + mixed


class ResizeConv(LearnedUpsampler):
    """Resize-convolution (Deconvolution and Checkerboard Artifacts, Distill 2016) on a narrow map.

    A 3x3 convolution of 512 channels at 224x224 takes 118 G multiply-adds an image. A linear layer therefore
    compresses the features to ``width`` channels at low resolution. Each stage interpolates this narrow map bilinearly
    to twice its size and adds a 3x3 convolution of it. A last linear layer maps it to ``C`` channels, and the result
    is added to the bilinear interpolation of the features. The last layer is initialised to zero, so that the initial
    upsampler is exactly the bilinear interpolation. The image is not read.
    """

    name = "resize_conv"

    def __init__(self, channels: int, stages: int = 4, width: int = 64, tile_pixels: int | None = None) -> None:
        """
        Args:
            channels: Of the features.
            stages: Number of 2x stages: 4 for stride 16.
            width: Channels of the narrow map.
            tile_pixels: Most output positions computed at once, by default chosen for the device.
        """
        super().__init__(channels, tile_pixels)
        self.width = width
        self.compress = nn.Linear(channels, width)
        self.stages = nn.ModuleList(_ResizeStage(width) for _ in range(stages))
        self.expand = nn.Linear(width, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def mapped_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_row_tiles`. Only the maps before the last stage are held as a whole."""
        sizes = self.stages_to(features, size, len(self.stages))
        narrow = self.compress(features)
        for stage, stage_size in enumerate(sizes[:-1]):
            narrow = torch.cat([tile for _, tile in self._stage_row_tiles(stage, narrow, stage_size)], 1)
        tiles = self._stage_row_tiles(len(sizes) - 1, narrow, size) if sizes else iter([(slice(0, size[0]), narrow)])
        values = features if channel_map is None else functional.linear(features, channel_map.weight)
        last = fold_into(self.expand, channel_map)
        down = interpolation_taps("bilinear", features.shape[1], size[0])
        across = interpolation_taps("bilinear", features.shape[2], size[1])
        for rows, tile in tiles:
            yield rows, resample(values, down[rows], across) + functional.linear(tile, last.weight, last.bias)

    def _stage_row_tiles(self, stage: int, narrow: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        down = interpolation_taps("bilinear", narrow.shape[1], size[0], reflect=1)
        across = interpolation_taps("bilinear", narrow.shape[2], size[1], reflect=1)
        for rows in row_slices(size, self.tile_pixels, narrow.device):
            yield rows, self.stages[stage](resample(narrow, down[rows.start : rows.stop + 2], across))

"""Resize-convolution, one of the trained upsamplers that FeatUp is compared with (FeatUp, section 4)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.kernels.resample import interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, row_bands
from featup.upsamplers.learned import LearnedUpsampler, fold_into

__all__ = ["ResizeConv"]


class _ResizeStage(nn.Module):
    """The convolution after one interpolation, as a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3)
        self.mix = nn.Linear(width, width)

    def forward(self, padded: Tensor) -> Tensor:
        """``[1, H + 2, W + 2, width]``, interpolated and padded, to ``[1, H, W, width]``."""
        found = self.spread(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed: Tensor = self.mix(functional.gelu(found))
        return padded[:, 1:-1, 1:-1] + mixed


class ResizeConv(LearnedUpsampler):
    """Resize-convolution (Odena et al., Deconvolution and Checkerboard Artifacts, 2016): interpolate, then convolve.

    The channels are mixed where that is cheap. A 3x3 convolution of 512 channels at 224x224 is 118 G multiply-adds
    an image, so a narrow map goes through the stages, made from the features at low resolution: each stage
    interpolates it bilinearly to twice its size and adds a 3x3 convolution of it, all ``width`` channels to all. Its
    end is a linear layer to ``C`` channels, added to the bilinear interpolation of the features. That layer starts at
    zero, so that untrained this is exactly the bilinear interpolation. Blind to the image.
    """

    name = "resize_conv"

    def __init__(self, channels: int, stages: int = 4, width: int = 64, tile_pixels: int | None = None) -> None:
        """
        Args:
            channels: Of the features it is made for.
            stages: Most doublings it can serve: 4 for stride 16.
            width: Channels of the narrow map.
            tile_pixels: Most output positions in the works at once, by default chosen for the device.
        """
        super().__init__(channels, tile_pixels)
        self.width = width
        self.compress = nn.Linear(channels, width)
        self.stages = nn.ModuleList(_ResizeStage(width) for _ in range(stages))
        self.expand = nn.Linear(width, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def mapped_bands(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_bands`. The last stage's map is never whole, only the smaller ones before it."""
        sizes = self.stages_to(features, size, len(self.stages))
        narrow = self.compress(features)
        for stage, stage_size in enumerate(sizes[:-1]):
            narrow = torch.cat([band for _, band in self._stage_bands(stage, narrow, stage_size)], 1)
        last = self._stage_bands(len(sizes) - 1, narrow, size) if sizes else iter([(slice(0, size[0]), narrow)])
        values = features if total is None else functional.linear(features, total.weight)
        end = fold_into(self.expand, total)
        down = interpolation_taps("bilinear", features.shape[1], size[0])
        across = interpolation_taps("bilinear", features.shape[2], size[1])
        for rows, band in last:
            yield rows, resample(values, down[rows], across) + functional.linear(band, end.weight, end.bias)

    def _stage_bands(self, stage: int, narrow: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        down = interpolation_taps("bilinear", narrow.shape[1], size[0], reflect=1)
        across = interpolation_taps("bilinear", narrow.shape[2], size[1], reflect=1)
        for rows in row_bands(size, self.tile_pixels, narrow.device):
            yield rows, self.stages[stage](resample(narrow, down[rows.start : rows.stop + 2], across))

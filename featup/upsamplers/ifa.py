"""IFA, one of the trained upsamplers that FeatUp is compared with (FeatUp, section 4)."""

from collections.abc import Iterator
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.kernels.resample import Taps, interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, row_bands
from featup.upsamplers.learned import LearnedUpsampler, fold_into

__all__ = ["IFA"]


class IFA(LearnedUpsampler):
    """Implicit feature alignment (Hu et al., ECCV 2022, arXiv 2206.08655): a network of coordinates, at any size.

    At each position, a perceptron takes each of the four nearest features together with the offset to it, encoded
    by sines and cosines, and the four answers are averaged with bilinear weights (the local ensemble). The first layer
    acts on the features at low resolution and the last one, linear, after the average, which changes nothing. The
    average is added to the bilinear interpolation; the last layer starts at zero, so that untrained this is exactly
    the bilinear interpolation. Blind to the image.
    """

    name = "ifa"
    frequencies = 4

    def __init__(self, channels: int, width: int = 64, tile_pixels: int | None = None) -> None:
        """
        Args:
            channels: Of the features it is made for.
            width: Of the perceptron's two hidden layers.
            tile_pixels: Most output positions in the works at once, by default chosen for the device.
        """
        super().__init__(channels, tile_pixels)
        self.width = width
        self.from_features = nn.Linear(channels, width)
        self.from_offset = nn.ModuleList(nn.Linear(1 + 2 * self.frequencies, width, bias=False) for _ in range(2))
        self.hidden = nn.Linear(width, width)
        self.expand = nn.Linear(width, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def mapped_bands(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_bands`."""
        low = self.from_features(features)
        values = features if total is None else functional.linear(features, total.weight)
        end = fold_into(self.expand, total)
        down = interpolation_taps("bilinear", features.shape[1], size[0]).to(features)
        across = interpolation_taps("bilinear", features.shape[2], size[1]).to(features)
        offset_y, offset_x = (
            layer(self._encode(_offsets(taps))) for layer, taps in zip(self.from_offset, (down, across), strict=True)
        )
        for rows in row_bands(size, self.tile_pixels, features.device):
            ensemble = torch.zeros((), dtype=features.dtype, device=features.device)
            for i in range(2):
                beside = low.index_select(1, down.index[rows, i]) + offset_y[rows, i, None]
                for j in range(2):
                    corner = beside.index_select(2, across.index[:, j]) + offset_x[:, j]
                    answer = functional.gelu(self.hidden(functional.gelu(corner)))
                    weight = down.weight[rows, i, None] * across.weight[:, j]
                    ensemble = ensemble + weight[..., None] * answer
            yield rows, resample(values, down[rows], across) + functional.linear(ensemble, end.weight, end.bias)

    def _encode(self, offsets: Tensor) -> Tensor:
        """``[N, 2]`` in features, to ``[N, 2, 1 + 2 * frequencies]``."""
        octaves = 2.0 ** torch.arange(self.frequencies, dtype=offsets.dtype, device=offsets.device)
        angles = offsets[..., None] * octaves * pi
        return torch.cat([offsets[..., None], angles.sin(), angles.cos()], -1)


def _offsets(taps: Taps) -> Tensor:
    """From each position to the two that its bilinear ``taps`` read: ``[N, 2]``, in positions of the axis they read."""
    centres = (torch.arange(len(taps), dtype=taps.weight.dtype, device=taps.weight.device) + 0.5) * (
        taps.size / len(taps)
    ) - 0.5
    return centres[:, None] - taps.index

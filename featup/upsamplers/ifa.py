"""IFA: a perceptron of the nearest features and the offsets to them (Hu et al., ECCV 2022).

A trained baseline of FeatUp (section 4).
"""

from collections.abc import Iterator
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.kernels.resample import Taps, interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, row_slices
from featup.upsamplers.learned import LearnedUpsampler, fold_into

__all__ = ["IFA"]


class IFA(LearnedUpsampler):
    """Implicit feature alignment (arXiv 2206.08655): a coordinate network that serves any size.

    At each position, a perceptron maps each of the four nearest features, together with the offset to it, encoded by
    sines and cosines. The four outputs are averaged with bilinear weights (the local ensemble). The part of the first
    layer that reads features is applied at low resolution. The last layer is linear, so it is applied once, to the
    average. Its output is added to the bilinear interpolation of the features. It is initialised to zero, so that the
    initial upsampler is exactly the bilinear interpolation. The image is not read.
    """

    name = "ifa"
    frequencies = 4

    def __init__(self, channels: int, width: int = 64, tile_pixels: int | None = None) -> None:
        """
        Args:
            channels: Of the features.
            width: Of the perceptron's two hidden layers.
            tile_pixels: Most output positions computed at once, by default chosen for the device.
        """
        super().__init__(channels, tile_pixels)
        self.width = width
        self.from_features = nn.Linear(channels, width)
        self.from_offset = nn.ModuleList(nn.Linear(1 + 2 * self.frequencies, width, bias=False) for _ in range(2))
        self.hidden = nn.Linear(width, width)
        self.expand = nn.Linear(width, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def mapped_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_row_tiles`."""
        low = self.from_features(features)
        values = features if channel_map is None else functional.linear(features, channel_map.weight)
        last = fold_into(self.expand, channel_map)
        down = interpolation_taps("bilinear", features.shape[1], size[0]).to(features)
        across = interpolation_taps("bilinear", features.shape[2], size[1]).to(features)
        offset_y, offset_x = (
            layer(self._encode(_offsets(taps))) for layer, taps in zip(self.from_offset, (down, across), strict=True)
        )
        for rows in row_slices(size, self.tile_pixels, features.device):
            ensemble = torch.zeros((), dtype=features.dtype, device=features.device)
            for i in range(2):
                beside = low.index_select(1, down.index[rows, i]) + offset_y[rows, i, None]
                for j in range(2):
                    corner = beside.index_select(2, across.index[:, j]) + offset_x[:, j]
                    output = functional.gelu(self.hidden(functional.gelu(corner)))
                    weight = down.weight[rows, i, None] * across.weight[:, j]
                    ensemble = ensemble + weight[..., None] * output
            yield rows, resample(values, down[rows], across) + functional.linear(ensemble, last.weight, last.bias)

    def _encode(self, offsets: Tensor) -> Tensor:
        """Offsets ``[N, 2]``, in positions of the coarse map, to ``[N, 2, 1 + 2 * frequencies]``."""
        octaves = 2.0 ** torch.arange(self.frequencies, dtype=offsets.dtype, device=offsets.device)
        angles = offsets[..., None] * octaves * pi
        return torch.cat([offsets[..., None], angles.sin(), angles.cos()], -1)


def _offsets(taps: Taps) -> Tensor:
    """Offsets from each position to the two that its bilinear ``taps`` read: ``[N, 2]``, in source positions."""
    centres = (torch.arange(len(taps), dtype=taps.weight.dtype, device=taps.weight.device) + 0.5) * (
        taps.size / len(taps)
    ) - 0.5
    return centres[:, None] - taps.index

"""Bilinear interpolation that keeps the vectors' norms: a baseline of our own that does not read the image."""

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional

from featup.kernels.resample import interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, Upsampler, row_slices

__all__ = ["NormBilinear"]


class NormBilinear(Upsampler):
    """The bilinear interpolation of the features, rescaled to the bilinear interpolation of their norms.

    It shows how much of an upsampler's gain is nothing but the norm, which the mean of different vectors lowers; see
    :func:`featup.upsamplers.base.norm_preserving_mean`. The factor of a position depends on all channels, so the map
    is not linear.
    """

    name = "norm_bilinear"

    def mapped_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_row_tiles`. The factor comes from all channels."""
        down = interpolation_taps("bilinear", features.shape[1], size[0])
        across = interpolation_taps("bilinear", features.shape[2], size[1])
        norms = features.norm(dim=-1, keepdim=True)
        mapped = None if channel_map is None else functional.linear(features, channel_map.weight)
        for rows in row_slices(size, None, features.device):
            tile = resample(features, down[rows], across)
            factor = resample(norms, down[rows], across) / tile.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            if mapped is None or channel_map is None:
                yield rows, tile * factor
            else:
                yield rows, resample(mapped, down[rows], across) * factor + channel_map.bias

    def row_tiles(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.row_tiles`; not linear."""
        return self.mapped_row_tiles(features, guidance, size, None)

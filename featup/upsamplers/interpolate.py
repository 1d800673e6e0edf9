"""Nearest, bilinear and bicubic interpolation: baselines that do not read the image."""

from collections.abc import Iterator

from torch import Tensor

from featup.kernels.resample import Interpolation, interpolation_taps, resample
from featup.upsamplers.base import Upsampler, row_slices

__all__ = ["Interpolate"]


class Interpolate(Upsampler):
    """Nearest, bilinear or bicubic interpolation, as ``torch.nn.functional.interpolate`` defines them."""

    def __init__(self, kind: Interpolation) -> None:
        super().__init__()
        self.name = kind
        self.kind: Interpolation = kind

    def row_tiles(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.row_tiles`; the guidance is ignored."""
        down = interpolation_taps(self.kind, features.shape[1], size[0])
        across = interpolation_taps(self.kind, features.shape[2], size[1])
        for rows in row_slices(size, None, features.device):
            yield rows, resample(features, down[rows], across)

"""Interpolations: the baselines, blind to the image."""

from torch import Tensor

from featup.kernels.resample import Interpolation, interpolation_taps, resample
from featup.upsamplers.base import Upsampler

__all__ = ["Interpolate"]


class Interpolate(Upsampler):
    """Nearest, bilinear or bicubic interpolation, as ``torch.nn.functional.interpolate`` defines them."""

    def __init__(self, kind: Interpolation) -> None:
        super().__init__()
        self.name = kind
        self.kind: Interpolation = kind

    def spatial(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Tensor:
        """See :meth:`Upsampler.spatial`; the guidance is not looked at."""
        rows = interpolation_taps(self.kind, features.shape[1], size[0])
        cols = interpolation_taps(self.kind, features.shape[2], size[1])
        return resample(features, rows, cols)

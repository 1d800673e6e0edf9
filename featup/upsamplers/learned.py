"""The learned and fitted upsamplers that FeatUp is compared with (FeatUp, section 4).

None of them makes all ``C`` channels at high resolution when a projection asks for fewer. :class:`CARAFE` and
:class:`SAPA` are linear over space once their kernels are known, and need a compression of the features to know them;
that compression is upsampled along with the values, by the same kernels, which is the same as compressing the
upsampled features, because the kernels sum to one. :class:`ResizeConv`, :class:`IFA` and :class:`DeepImagePrior` end
in a linear layer that makes the channels out of a narrow map, and a projection folds into that layer.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from featup.errors import GeometryError
from featup.upsamplers.base import ChannelMap, Upsampler, stage_sizes

__all__ = []


class LearnedUpsampler(Upsampler):
    """What the trained baselines share: made for so many channels."""

    def __init__(self, channels: int, tile_pixels: int | None) -> None:
        super().__init__()
        self.channels = channels
        self.tile_pixels = tile_pixels

    def mixing(self, channels: int) -> None:
        """None: the channels are mixed before the end. Raises GeometryError for other features than trained for."""
        if channels != self.channels:
            raise GeometryError(
                f"{self.name}: made for {self.channels} channels, got features of {channels}; "
                "use one trained for this backbone and layer"
            )

    def stages_to(self, low: Tensor, size: tuple[int, int], have: int) -> Sequence[tuple[int, int]]:
        """Sizes after each stage; raises GeometryError where that takes more stages than there are."""
        start = (low.shape[1], low.shape[2])
        sizes = stage_sizes(start, size)
        if len(sizes) > have:
            raise GeometryError(
                f"{self.name}: {start} to {size} (height, width) takes {len(sizes)} doublings and there are {have} "
                f"stages; ask for at most {tuple(side << have for side in start)}, or train with more stages"
            )
        return sizes


def fold_into(layer: nn.Linear, total: ChannelMap | None) -> ChannelMap:
    """A last layer and then ``total``, as one channel map."""
    last = ChannelMap(layer.weight, layer.bias)
    return last if total is None else total.after(last)

"""The base of the trained upsamplers that FeatUp is compared with (FeatUp, section 4).

A trained upsampler never computes all ``C`` channels at high resolution when a projection asks for fewer.

- CARAFE and SAPA predict kernels from a compression of the features, and are linear over space given the kernels.
  The compression is upsampled by the same kernels as the values. Because the kernels sum to one, this equals the
  compression of the upsampled features.
- Resize-convolution and IFA end in a linear layer from a narrow map to the channels. A projection is folded into that
  layer.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from featup.errors import GeometryError
from featup.upsamplers.base import ChannelMap, Upsampler, stage_sizes

__all__ = ["LearnedUpsampler", "fold_into"]


class LearnedUpsampler(Upsampler):
    """A trained upsampler for features of a fixed number of channels."""

    def __init__(self, channels: int, tile_pixels: int | None) -> None:
        super().__init__()
        self.channels = channels
        self.tile_pixels = tile_pixels

    def output_projection(self, channels: int) -> None:
        """None: the channels are mixed before the end.

        Raises:
            GeometryError: ``channels`` differ from those of the training.
        """
        if channels != self.channels:
            raise GeometryError(
                f"{self.name}: made for {self.channels} channels, got features of {channels}; "
                "use an upsampler trained for this backbone and layer"
            )

    def stages_to(self, features: Tensor, size: tuple[int, int], available: int) -> Sequence[tuple[int, int]]:
        """Sizes after each 2x stage from ``features [1, h, w, C]`` to ``size``.

        Raises:
            GeometryError: more stages are needed than are ``available``.
        """
        low = (features.shape[1], features.shape[2])
        sizes = stage_sizes(low, size)
        if len(sizes) > available:
            raise GeometryError(
                f"{self.name}: {low} to {size} (height, width) takes {len(sizes)} 2x stages and there are {available}; "
                f"ask for at most {tuple(side << available for side in low)}, or train one for this "
                f"size: featup train --upsampler {self.name} --stages {len(sizes)}"
            )
        return sizes


def fold_into(layer: nn.Linear, channel_map: ChannelMap | None) -> ChannelMap:
    """A last layer followed by ``channel_map``, as one channel map."""
    last = ChannelMap(layer.weight, layer.bias)
    return last if channel_map is None else channel_map.after(last)

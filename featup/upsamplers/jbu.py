"""The paper's learned stack of joint bilateral upsamplers (FeatUp, section 3.2, equations 5 to 7)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.window_correlation import window_correlation
from featup.upsamplers.base import ChannelMap, normalise_colours
from featup.upsamplers.joint import JointUpsampler

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "JBU", "JBUStage"]

# The normalisation of the guidance in official checkpoints, whatever the backbone's own is.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class _Dropped(NamedTuple):
    """Factors of the hidden channels of a stage's two networks: 0 where a channel is dropped, else above 1."""

    range: Tensor
    fixup: Tensor


class JBUStage(nn.Module):
    """Filters of one stage: a learned range kernel times a Gaussian, and a small learned correction.

    A small network turns the colours of each position into a key, and the range kernel compares keys by the dot
    product. The largest weight goes to the key with the largest product, which need not be the most similar key.
    """

    def __init__(self, key_dim: int = 32, radius: int = 3, dropout: float = 0.1) -> None:
        """
        Args:
            key_dim, radius, dropout: See :class:`JBU`.
        """
        super().__init__()
        self.radius = radius
        self.dropout = dropout
        taps = (2 * radius + 1) ** 2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_in = nn.Linear(3, key_dim)
        self.range_out = nn.Linear(key_dim, key_dim)
        self.fixup_in = nn.Linear(taps + 3, taps)
        self.fixup_out = nn.Linear(taps, taps)

    def forward(self, padded_guidance: Tensor, dropped: _Dropped | None = None) -> Tensor:
        """``[B, H + 2r, W + 2r, 3]``, normalised, to filters ``[B, H, W, 2r + 1, 2r + 1]``.

        The taps need not sum to one, because the correction is added after the normalisation.

        Args:
            dropped: Of :meth:`sample_dropout`; none in evaluation.
        """
        radius = self.radius
        inside = (slice(None), slice(radius, -radius), slice(radius, -radius))
        hidden = functional.gelu(self.range_in(padded_guidance))
        keys = self.range_out(hidden if dropped is None else hidden * dropped.range)
        temperature = self.range_temp.exp().clamp(1e-4, 1e4)
        correlation = window_correlation(keys[inside] * temperature, keys)
        kernel = correlation.flatten(-2).softmax(-1) * self._gaussian()
        kernel = kernel / kernel.sum(-1, keepdim=True).clamp_min(1e-7)
        hidden = functional.gelu(self.fixup_in(torch.cat([kernel, padded_guidance[inside]], -1)))
        correction = self.fixup_out(hidden if dropped is None else hidden * dropped.fixup)
        filters: Tensor = kernel + 0.1 * correction
        return filters.view(correlation.shape)

    def sample_dropout(self) -> _Dropped | None:
        """Sample which hidden channels are dropped, in training; ``None`` in evaluation.

        A channel is dropped at all positions of an image, as in the original. The keys of two positions that miss
        different channels could not be compared.
        """
        if not (self.training and self.dropout):
            return None
        return _Dropped(
            *(functional.dropout(torch.ones_like(layer.bias), self.dropout) for layer in (self.range_in, self.fixup_in))
        )

    def _gaussian(self) -> Tensor:
        """``[(2r + 1)^2]`` on offsets scaled to [-1, 1], as the official weights expect."""
        offsets = torch.linspace(
            -1, 1, 2 * self.radius + 1, device=self.sigma_spatial.device, dtype=self.sigma_spatial.dtype
        ).square()
        return torch.exp(-(offsets[:, None] + offsets).flatten() / (2 * self.sigma_spatial**2))


class JBU(JointUpsampler):
    """A stack of learned 2x stages, and a small residual channel map at the end.

    A smaller target size runs fewer stages. The last stage that runs ends exactly at the target size.
    """

    name = "jbu"

    def __init__(
        self,
        channels: int,
        stages: int = 4,
        key_dim: int = 32,
        radius: int = 3,
        guidance_mean: Sequence[float] = IMAGENET_MEAN,
        guidance_std: Sequence[float] = IMAGENET_STD,
        tile_pixels: int | None = None,
        dropout: float = 0.1,
        end_dropout: float = 0.2,
    ) -> None:
        """
        Args:
            channels: Of the features.
            stages: Number of 2x stages: 4 for stride 16, 5 for stride 32.
            key_dim: Channels of the range kernel's keys.
            guidance_mean, guidance_std: Normalisation of the image inside the upsampler, on [0, 1] RGB.
            radius, tile_pixels: See :class:`JointUpsampler`.
            dropout: Probability that a hidden channel of the filters' two small networks is dropped in training, at
                all positions of an image, in [0, 1).
            end_dropout: Likewise for an input channel of the residual channel map, for the whole batch.

        Raises:
            GeometryError: a radius below one, or a dropout outside [0, 1).
        """
        super().__init__(radius, tile_pixels)
        if not (0 <= dropout < 1 and 0 <= end_dropout < 1):
            raise GeometryError(f"jbu: dropout={dropout} and end_dropout={end_dropout} must be at least 0 and below 1")
        self.channels = channels
        self.key_dim = key_dim
        self.guidance_mean = tuple(guidance_mean)
        self.guidance_std = tuple(guidance_std)
        self.end_dropout = end_dropout
        # Saved checkpoints hold the names ``stages`` and ``fixup``.
        self.stages = nn.ModuleList(JBUStage(key_dim, radius, dropout) for _ in range(stages))
        self.fixup = nn.Linear(channels, channels)

    def output_projection(self, channels: int) -> ChannelMap:
        """``x + 0.1 * fixup(x)`` as one channel map."""
        if channels != self.channels:
            raise GeometryError(
                f"jbu: made for {self.channels} channels, got features of {channels}; "
                "use a checkpoint trained for this backbone and layer"
            )
        weight = self.fixup.weight
        # In training a channel is dropped for the whole batch. Dropout sampled at every position would not commute with
        # the operator over space, and all channels would have to be computed at high resolution.
        scale = functional.dropout(weight.new_ones(channels), self.end_dropout, self.training)
        identity = torch.eye(channels, device=weight.device, dtype=weight.dtype)
        return ChannelMap(identity + 0.1 * weight * scale, 0.1 * self.fixup.bias)

    def largest(self, low: tuple[int, int]) -> tuple[int, int]:
        """See :meth:`Upsampler.largest`: the stack's 2x stages limit it."""
        return low[0] << len(self.stages), low[1] << len(self.stages)

    def check_stages(self, count: int, low: tuple[int, int], high: tuple[int, int]) -> None:
        """See :meth:`JointUpsampler.check_stages`."""
        if count > len(self.stages):
            raise GeometryError(
                f"jbu: {low} to {high} (height, width) takes {count} 2x stages and the stack has {len(self.stages)}; "
                f"ask for at most {self.largest(low)}, or train a stack for this size: featup train --stages {count}"
            )

    def prepare_guidance(self, guidance: Tensor) -> Tensor:
        """From [0, 1] to the normalisation that the stack was trained with."""
        return normalise_colours(guidance, self.guidance_mean, self.guidance_std)

    def stage_filters(self, stage: int) -> Callable[[Tensor], Tensor]:
        """See :meth:`JointUpsampler.stage_filters`; all tiles of an image miss the same hidden channels."""
        module = self.stages[stage]
        assert isinstance(module, JBUStage)
        return partial(module, dropped=module.sample_dropout())

"""The learned stack of joint bilateral upsamplers (FeatUp, section 3.2, equations 5 to 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.resample import BICUBIC_A
from featup.kernels.window_correlation import window_correlation
from featup.names import RangeKernel
from featup.upsamplers.base import ChannelMap
from featup.upsamplers.joint import JointUpsampler

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "JBU", "JBUStage"]

# What the official checkpoints' guidance is normalised with, whatever the backbone wants.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LEAST_LOGIT = -20.0


class JBUStage(nn.Module):
    """Filters of one stage: a learned range kernel times a Gaussian.

    The range kernel compares keys that are made from colours. With ``projection``, the paper's, by their product, so
    that the key with the largest product wins, not the most similar one; a small learned correction is added. With
    ``distance`` by minus half their squared distance, so that nothing is more similar to a position than itself; such a
    stage starts as the bilateral filter of ``start``. It has no correction: its filters stay weighted
    means, which a linear probe of coarse features takes as it takes these.
    """

    def __init__(
        self,
        key_dim: int = 32,
        radius: int = 3,
        dropout: float = 0.1,
        kernel: RangeKernel = "projection",
        start: tuple[float, float] = (3.0, 0.1),
        feature_keys: int = 0,
        start_feature: float = 0.4,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.radius = radius
        self.dropout = dropout
        taps = (2 * radius + 1) ** 2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        guides = 3 + feature_keys
        self.range_in = nn.Linear(guides, key_dim)
        self.range_out = nn.Linear(key_dim, key_dim)
        if kernel == "projection":
            self.fixup_in = nn.Linear(taps + guides, taps)
            self.fixup_out = nn.Linear(taps, taps)
            return
        self.range_skip = nn.Linear(guides, key_dim, bias=False)
        nn.init.zeros_(self.range_out.weight)
        nn.init.zeros_(self.range_out.bias)
        with torch.no_grad():
            self.range_skip.weight.copy_(torch.eye(key_dim, guides))
            self.range_skip.weight[:, :3] /= start[1]
            self.range_skip.weight[:, 3:] /= start_feature
            self.sigma_spatial.fill_(start[0] / radius)

    def forward(self, padded_guidance: Tensor) -> Tensor:
        """``[B, H + 2r, W + 2r, 3 + D]``, normalised, to filters ``[B, H, W, 2r + 1, 2r + 1]``.

        With a correction the taps need not sum to one: it is added after the normalisation.
        """
        radius = self.radius
        inside = (slice(None), slice(radius, -radius), slice(radius, -radius))
        keys = self.range_out(self._hidden(self.range_in(padded_guidance)))
        temperature = self.range_temp.exp().clamp(1e-4, 1e4)
        query = keys[inside]
        if self.kernel == "distance":
            keys = keys + self.range_skip(padded_guidance)
            query = torch.cat([keys[inside], torch.ones_like(keys[inside][..., :1])], -1)
            # The query's own square is the same over its window: the softmax cancels it.
            keys = torch.cat([keys, -0.5 * keys.square().sum(-1, keepdim=True)], -1)
        correlation = window_correlation(query * temperature, keys)
        if self.kernel == "distance":
            # No further below the centre than counts: subnormal numbers take a CPU a hundred times as long.
            centre = correlation[..., self.radius, self.radius, None, None]
            correlation = (correlation - centre).clamp_min(_LEAST_LOGIT)
        kernel = correlation.flatten(-2).softmax(-1) * self._gaussian()
        kernel = kernel / kernel.sum(-1, keepdim=True).clamp_min(1e-7)
        if self.kernel == "distance":
            weights: Tensor = kernel.view(correlation.shape)
            return weights
        correction = torch.cat([kernel, padded_guidance[inside]], -1)
        correction = self.fixup_out(self._hidden(self.fixup_in(correction)))
        filters: Tensor = kernel + 0.1 * correction
        return filters.view(correlation.shape)

    def _hidden(self, values: Tensor) -> Tensor:
        return functional.dropout(functional.gelu(values), self.dropout, self.training)

    def _gaussian(self) -> Tensor:
        """``[(2r + 1)^2]`` on offsets scaled to [-1, 1], as the official weights expect."""
        offsets = torch.linspace(
            -1, 1, 2 * self.radius + 1, device=self.sigma_spatial.device, dtype=self.sigma_spatial.dtype
        ).square()
        return torch.exp(-(offsets[:, None] + offsets).flatten() / (2 * self.sigma_spatial**2))


class JBU(JointUpsampler):
    """A stack of learned 2x stages and, with the paper's kernel, a small residual map of channels at the end.

    The last stage that runs ends exactly at the size asked for; a nearer size runs fewer stages.
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
        kernel: RangeKernel = "projection",
        start: tuple[float, float] = (3.0, 0.1),
        feature_keys: int = 0,
        start_feature: float = 0.4,
        coarse_stages: int = 0,
        start_coarse: float = 1.0,
        bicubic_a: float = BICUBIC_A,
    ) -> None:
        """
        Args:
            channels: Of the features the stack is made for.
            stages: Most doublings it can serve: 4 for stride 16.
            key_dim: Width of the range kernel's projection.
            guidance_mean, guidance_std: Normalisation of the image inside the upsampler, on [0, 1] RGB.
            radius, tile_pixels: See :class:`JointUpsampler`.
            dropout: Probability that a hidden unit of the filters' two small networks is left out, in training only.
            end_dropout: Likewise for a channel on its way into the map of channels at the end.
            kernel: See :class:`JBUStage`. With ``distance`` the colours it starts from are those of [-1, 1]: give 0.5
                as mean and standard deviation of the guidance.
            start: The bilateral filter that ``distance`` starts as: its sigmas in pixels of a stage and in colour.
            feature_keys: With ``distance``, how many directions of the coarse features the range kernel sees beside
                the colours: what looks alike but is not the same thing is kept apart, what is one thing and looks
                different is joined. :meth:`set_feature_keys` gives them; until then they are zero.
            start_feature: The sigma that ``distance`` starts with along them, in their standard deviations together.
            coarse_stages: Stages at the features' own size before the doublings, which make tokens of one thing agree;
                their means are kept as long as the tokens, see :func:`featup.upsamplers.base.keeping_lengths`.
            start_coarse: The sigma in colour that these start with.
            bicubic_a: Of the interpolation inside a stage. Further below zero it sharpens what the filters then
                blur; official weights are for the default.

        Raises:
            GeometryError: a radius below one, a dropout outside [0, 1), a start that is not positive, keys of the
                features with the paper's kernel, or more of them than the kernel is wide.
        """
        super().__init__(radius, tile_pixels)
        if feature_keys and (kernel == "projection" or feature_keys + 3 > key_dim or feature_keys > channels):
            raise GeometryError(
                f"jbu: feature_keys={feature_keys} with kernel={kernel!r}: only the distance kernel takes them, "
                f"at most key_dim - 3 = {key_dim - 3} and one for each of {channels} channels"
            )
        if not (0 <= dropout < 1 and 0 <= end_dropout < 1):
            raise GeometryError(f"jbu: dropout={dropout} and end_dropout={end_dropout} must be at least 0 and below 1")
        if not min(*start, start_feature, start_coarse) > 0:
            raise GeometryError(
                f"jbu: start={start}, start_feature={start_feature} and start_coarse={start_coarse} are sigmas and "
                "must be positive"
            )
        self.channels = channels
        self.key_dim = key_dim
        self.guidance_mean = tuple(guidance_mean)
        self.guidance_std = tuple(guidance_std)
        self.end_dropout = end_dropout
        self.feature_keys = feature_keys
        self.coarse_stages = coarse_stages
        guides = (feature_keys, start_feature)
        self.stages = nn.ModuleList(JBUStage(key_dim, radius, dropout, kernel, start, *guides) for _ in range(stages))
        self.coarse = nn.ModuleList(
            JBUStage(key_dim, radius, dropout, kernel, (start[0], start_coarse), *guides) for _ in range(coarse_stages)
        )
        if feature_keys:
            self.register_buffer("feature_map", torch.zeros(feature_keys, channels))
            self.feature_map: Tensor
        self.kernel = kernel
        self.bicubic_a = bicubic_a
        if kernel == "projection":
            self.fixup = nn.Linear(channels, channels)

    def set_feature_keys(self, components: Tensor, variance: Tensor) -> None:
        """Take directions of the features, those of a PCA of the training images', as the keys.

        Their unit is the root of the variance they hold together, whatever the scale of a backbone's features.

        Args:
            components: Orthonormal rows ``[feature_keys, C]``.
            variance: ``[feature_keys]``, of the features along each.

        Raises:
            GeometryError: not as many as there are keys, or of other features.
        """
        shape = (self.feature_keys, self.channels)
        if tuple(components.shape) != shape:
            raise GeometryError(f"jbu: the keys take components {list(shape)}, got {list(components.shape)}")
        unit = variance.sum().sqrt().clamp_min(1e-6)
        self.feature_map.copy_(components / unit)

    def keys(self, features: Tensor) -> Tensor | None:
        """See :meth:`JointUpsampler.keys`. The filters only compare them: their mean does not matter."""
        return functional.linear(features, self.feature_map) if self.feature_keys else None

    def mixing(self, channels: int) -> ChannelMap | None:
        """``x + 0.1 * fixup(x)`` as one channel map; none with the distance kernel."""
        if channels != self.channels:
            raise GeometryError(
                f"jbu: made for {self.channels} channels, got features of {channels}; "
                "use a checkpoint trained for this backbone and layer"
            )
        if self.kernel == "distance":
            return None
        weight = self.fixup.weight
        # In training a channel is left out for the whole batch. One drawn anew at every position would not commute
        # with the operator over space, and all channels would have to be made at high resolution.
        kept = functional.dropout(weight.new_ones(channels), self.end_dropout, self.training)
        identity = torch.eye(channels, device=weight.device, dtype=weight.dtype)
        return ChannelMap(identity + 0.1 * weight * kept, 0.1 * self.fixup.bias)

    def largest(self, low: tuple[int, int]) -> tuple[int, int]:
        """See :meth:`Upsampler.largest`: as far as the stack goes."""
        return low[0] << len(self.stages), low[1] << len(self.stages)

    def check_stages(self, count: int, low: tuple[int, int], high: tuple[int, int]) -> None:
        """See :meth:`JointUpsampler.check_stages`."""
        if count > len(self.stages):
            raise GeometryError(
                f"jbu: {low} to {high} (height, width) takes {count} doublings and the stack has {len(self.stages)}; "
                f"ask for at most {self.largest(low)}, or train a deeper stack"
            )

    def prepare_guidance(self, guidance: Tensor) -> Tensor:
        """From [0, 1] to the normalisation the stack was trained with."""
        return (guidance - guidance.new_tensor(self.guidance_mean)) / guidance.new_tensor(self.guidance_std)

    def filters(self, stage: int, padded_guidance: Tensor) -> Tensor:
        """See :meth:`JointUpsampler.filters`."""
        filters: Tensor = (self.coarse[stage] if stage < 0 else self.stages[stage])(padded_guidance)
        return filters

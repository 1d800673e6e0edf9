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

# The normalisation of the guidance in official checkpoints, whatever the backbone's own is.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LEAST_LOGIT = -20.0


class JBUStage(nn.Module):
    """Filters of one stage: a learned range kernel times a Gaussian.

    A small network turns the guidance channels of each position into a key, and the range kernel compares keys.

    - ``projection``, the paper's kernel, compares by the dot product. The largest weight goes to the key with the
      largest product, which need not be the most similar key. A small learned correction is added to the filters.
    - ``distance`` compares by minus half the squared distance, so that each position is most similar to itself. The
      stage is initialised as a bilateral filter. It has no correction: its filters stay weighted means, whose results
      a linear probe of coarse features reads as it reads coarse features.
    """

    def __init__(
        self,
        key_dim: int = 32,
        radius: int = 3,
        dropout: float = 0.1,
        kernel: RangeKernel = "projection",
        initial_sigmas: tuple[float, float] = (3.0, 0.1),
        affinity_channels: int = 0,
        initial_affinity_sigma: float = 0.4,
    ) -> None:
        """
        Args:
            key_dim, radius, dropout, kernel: See :class:`JBU`.
            initial_sigmas: With ``distance``: in pixels of the stage, and in colour.
            affinity_channels: With ``distance``: guidance channels beside the colours.
            initial_affinity_sigma: With ``distance``: along those channels.
        """
        super().__init__()
        self.kernel = kernel
        self.radius = radius
        self.dropout = dropout
        taps = (2 * radius + 1) ** 2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        guidance_channels = 3 + affinity_channels
        self.range_in = nn.Linear(guidance_channels, key_dim)
        self.range_out = nn.Linear(key_dim, key_dim)
        if kernel == "projection":
            self.fixup_in = nn.Linear(taps + guidance_channels, taps)
            self.fixup_out = nn.Linear(taps, taps)
            return
        self.range_skip = nn.Linear(guidance_channels, key_dim, bias=False)
        nn.init.zeros_(self.range_out.weight)
        nn.init.zeros_(self.range_out.bias)
        with torch.no_grad():
            self.range_skip.weight.copy_(torch.eye(key_dim, guidance_channels))
            self.range_skip.weight[:, :3] /= initial_sigmas[1]
            self.range_skip.weight[:, 3:] /= initial_affinity_sigma
            self.sigma_spatial.fill_(initial_sigmas[0] / radius)

    def forward(self, padded_guidance: Tensor) -> Tensor:
        """``[B, H + 2r, W + 2r, 3 + D]``, normalised, to filters ``[B, H, W, 2r + 1, 2r + 1]``.

        With ``projection`` the taps need not sum to one, because the correction is added after the normalisation.
        """
        radius = self.radius
        inside = (slice(None), slice(radius, -radius), slice(radius, -radius))
        keys = self.range_out(self._hidden(self.range_in(padded_guidance)))
        temperature = self.range_temp.exp().clamp(1e-4, 1e4)
        query = keys[inside]
        if self.kernel == "distance":
            keys = keys + self.range_skip(padded_guidance)
            query = torch.cat([keys[inside], torch.ones_like(keys[inside][..., :1])], -1)
            # The square of the query is constant over its window: the softmax cancels it.
            keys = torch.cat([keys, -0.5 * keys.square().sum(-1, keepdim=True)], -1)
        correlation = window_correlation(query * temperature, keys)
        if self.kernel == "distance":
            # Smaller weights would not count, and subnormal numbers take a CPU a hundred times as long.
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
    """A stack of learned 2x stages and, with the paper's kernel, a small residual channel map at the end.

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
        kernel: RangeKernel = "projection",
        initial_sigmas: tuple[float, float] = (3.0, 0.1),
        affinity_channels: int = 0,
        initial_affinity_sigma: float = 0.4,
        same_resolution_stages: int = 0,
        initial_same_resolution_sigma: float = 1.0,
        bicubic_a: float = BICUBIC_A,
    ) -> None:
        """
        Args:
            channels: Of the features.
            stages: Number of 2x stages: 4 for stride 16.
            key_dim: Channels of the range kernel's keys.
            guidance_mean, guidance_std: Normalisation of the image inside the upsampler, on [0, 1] RGB.
            radius, tile_pixels: See :class:`JointUpsampler`.
            dropout: Probability that a hidden unit of the filters' two small networks is dropped in training, in
                [0, 1).
            end_dropout: Likewise for an input channel of the residual channel map.
            kernel: See :class:`JBUStage`. The initial sigmas of ``distance`` are for colours in [-1, 1]: give 0.5 as
                mean and standard deviation of the guidance.
            initial_sigmas: With ``distance``: the sigmas of the initial bilateral filter, in pixels of a stage and in
                colour, above 0.
            affinity_channels: With ``distance``: channels computed from the coarse features that the range kernel
                compares beside the colours. They separate objects of like colour, and join the differently coloured
                parts of one object. They are zero until :meth:`set_affinity_projection` is called.
            initial_affinity_sigma: With ``distance``: the initial sigma along those channels, above 0, in the root of
                their total variance.
            same_resolution_stages: Stages that filter the coarse features at their own size before the 2x stages; see
                :func:`featup.upsamplers.base.norm_preserving_mean`.
            initial_same_resolution_sigma: With ``distance``: their initial sigma in colour, above 0.
            bicubic_a: Keys' ``a`` of the interpolation inside a stage. Below the default it sharpens the map that the
                filters then blur. Official weights need the default.

        Raises:
            GeometryError: a radius below one, a dropout outside [0, 1), an initial sigma that is not positive,
                affinity channels with the paper's kernel, or more of them than the keys or the features allow.
        """
        super().__init__(radius, tile_pixels)
        if affinity_channels and (
            kernel == "projection" or affinity_channels + 3 > key_dim or affinity_channels > channels
        ):
            raise GeometryError(
                f"jbu: affinity_channels={affinity_channels} with kernel={kernel!r}: only the distance kernel takes "
                f"them, at most key_dim - 3 = {key_dim - 3} and one for each of {channels} channels; ask for fewer"
            )
        if not (0 <= dropout < 1 and 0 <= end_dropout < 1):
            raise GeometryError(f"jbu: dropout={dropout} and end_dropout={end_dropout} must be at least 0 and below 1")
        if not min(*initial_sigmas, initial_affinity_sigma, initial_same_resolution_sigma) > 0:
            raise GeometryError(
                f"jbu: initial_sigmas={initial_sigmas}, initial_affinity_sigma={initial_affinity_sigma} and "
                f"initial_same_resolution_sigma={initial_same_resolution_sigma} must be positive"
            )
        self.channels = channels
        self.key_dim = key_dim
        self.guidance_mean = tuple(guidance_mean)
        self.guidance_std = tuple(guidance_std)
        self.end_dropout = end_dropout
        self.affinity_channels = affinity_channels
        self.same_resolution_stages = same_resolution_stages
        affinity = (affinity_channels, initial_affinity_sigma)
        coarse_sigmas = (initial_sigmas[0], initial_same_resolution_sigma)
        # Saved checkpoints hold the names ``stages``, ``coarse`` and ``feature_map``.
        self.stages = nn.ModuleList(
            JBUStage(key_dim, radius, dropout, kernel, initial_sigmas, *affinity) for _ in range(stages)
        )
        self.coarse = nn.ModuleList(
            JBUStage(key_dim, radius, dropout, kernel, coarse_sigmas, *affinity) for _ in range(same_resolution_stages)
        )
        if affinity_channels:
            self.register_buffer("feature_map", torch.zeros(affinity_channels, channels))
            self.feature_map: Tensor
        self.kernel = kernel
        self.bicubic_a = bicubic_a
        if kernel == "projection":
            self.fixup = nn.Linear(channels, channels)

    def set_affinity_projection(self, components: Tensor, variance: Tensor) -> None:
        """Set the projection from features to affinity channels: principal components of the training images' features.

        It is scaled by the root of the components' total variance, so that the scale of the features does not matter.

        Args:
            components: Orthonormal directions ``[affinity_channels, C]``.
            variance: ``[affinity_channels]``, of the features along each.

        Raises:
            GeometryError: components of another shape.
        """
        shape = (self.affinity_channels, self.channels)
        if tuple(components.shape) != shape:
            raise GeometryError(
                f"jbu: the affinity projection takes components {list(shape)}, got {list(components.shape)}; fit a PCA "
                "with that many components on this backbone and layer"
            )
        unit = variance.sum().sqrt().clamp_min(1e-6)
        self.feature_map.copy_(components / unit)

    def affinity_features(self, features: Tensor) -> Tensor | None:
        """See :meth:`JointUpsampler.affinity_features`. Filters read differences only, so the mean stays in."""
        return functional.linear(features, self.feature_map) if self.affinity_channels else None

    def output_projection(self, channels: int) -> ChannelMap | None:
        """``x + 0.1 * fixup(x)`` as one channel map; none with the distance kernel."""
        if channels != self.channels:
            raise GeometryError(
                f"jbu: made for {self.channels} channels, got features of {channels}; "
                "use a checkpoint trained for this backbone and layer"
            )
        if self.kernel == "distance":
            return None
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
                f"ask for at most {self.largest(low)}, or train a deeper stack"
            )

    def prepare_guidance(self, guidance: Tensor) -> Tensor:
        """From [0, 1] to the normalisation that the stack was trained with."""
        return (guidance - guidance.new_tensor(self.guidance_mean)) / guidance.new_tensor(self.guidance_std)

    def filters(self, stage: int, padded_guidance: Tensor) -> Tensor:
        """See :meth:`JointUpsampler.filters`."""
        filters: Tensor = (self.coarse[stage] if stage < 0 else self.stages[stage])(padded_guidance)
        return filters

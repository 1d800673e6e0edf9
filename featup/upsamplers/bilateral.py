"""Joint bilateral upsampling: a training-free filter that follows the edges of the image and of the features.

Kopf et al., Joint Bilateral Upsampling (SIGGRAPH 2007), applied as a stack of 2x stages like FeatUp's learned stack.
That the filter compares the features beside the colours, and first filters them at their own size, is this project's
addition.
"""

import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.window_correlation import window_correlation
from featup.upsamplers.joint import JointUpsampler

__all__ = ["Bilateral", "principal_scores"]

# Smaller weights would not count, and subnormal numbers take a CPU a hundred times as long.
_LEAST_LOGIT = -20.0
# Of a same-resolution stage: the mean colour of a cell says little.
_SAME_RESOLUTION_SIGMA_COLOUR = 1.0


class Bilateral(JointUpsampler):
    """Weights ``exp(-d^2 / 2 sigma_space^2 - c^2 / 2 sigma_colour^2 - f^2 / 2 sigma_feature^2)`` over a window.

    They are normalised to sum to one. ``d`` is the distance of two positions, ``c`` that of their colours, and ``f``
    that of their features along the first principal components of the image's own coarse features. Feature affinity
    separates objects of like colour, and joins the differently coloured parts of one object. The components are each
    image's own, so a result depends on nothing but its image: on no batch mates, and on no data set.
    """

    name = "bilateral"

    def __init__(
        self,
        sigma_space: float = 1.5,
        sigma_colour: float = 0.15,
        sigma_feature: float = 0.6,
        feature_components: int = 8,
        same_resolution_stages: int = 1,
        sigma_coarse: float = 0.5,
        radius: int = 3,
        tile_pixels: int | None = None,
    ) -> None:
        """
        Args:
            sigma_space: In pixels of a 2x stage, above 0.
            sigma_colour: In a 2x stage, on RGB scaled to [-1, 1], above 0 (0.2 is about 25 grey levels of 255).
            sigma_feature: In the root of the total variance of the compared components, above 0.
            feature_components: How many principal components are compared; 0 compares colours alone.
            same_resolution_stages: How many times the coarse features are filtered at their own size first, at least
                0. Means keep the vectors' norms, see :func:`featup.upsamplers.base.norm_preserving_mean`.
            sigma_coarse: The sigma in space of such a filtering, in cells, above 0. A larger one averages each object
                more, and blurs what is as thin as a cell.
            radius, tile_pixels: See :class:`JointUpsampler`.

        Raises:
            GeometryError: a sigma that is not positive, a radius below one, or a negative number of components or
                stages.
        """
        super().__init__(radius, tile_pixels)
        if not min(sigma_space, sigma_colour, sigma_feature, sigma_coarse) > 0:
            raise GeometryError(
                f"bilateral: sigma_space={sigma_space}, sigma_colour={sigma_colour}, sigma_feature={sigma_feature} and "
                f"sigma_coarse={sigma_coarse} must all be positive"
            )
        if feature_components < 0 or same_resolution_stages < 0:
            raise GeometryError(
                f"bilateral: feature_components={feature_components} and "
                f"same_resolution_stages={same_resolution_stages} must be at least 0"
            )
        self.sigma_space = sigma_space
        self.sigma_colour = sigma_colour
        self.sigma_feature = sigma_feature
        self.feature_components = feature_components
        self.same_resolution_stages = same_resolution_stages
        self.sigma_coarse = sigma_coarse

    def prepare_guidance(self, guidance: Tensor) -> Tensor:
        """From [0, 1] to [-1, 1]."""
        return guidance * 2 - 1

    def affinity_features(self, features: Tensor) -> Tensor | None:
        """See :meth:`JointUpsampler.affinity_features`."""
        return principal_scores(features, self.feature_components) if self.feature_components else None

    def filters(self, stage: int, padded_guidance: Tensor) -> Tensor:
        """See :meth:`JointUpsampler.filters`; every 2x stage has the same kernel."""
        radius = self.radius
        coarse = (self.sigma_coarse, _SAME_RESOLUTION_SIGMA_COLOUR)
        space, colour = coarse if stage < 0 else (self.sigma_space, self.sigma_colour)
        sigmas = [colour] * 3 + [self.sigma_feature] * (padded_guidance.shape[-1] - 3)
        # -|p - q|^2 / 2s^2 = (p.q - |q|^2 / 2) / s^2 - |p|^2 / 2s^2: the first term is a correlation, and the
        # normalisation over the window cancels the second.
        scaled = padded_guidance / padded_guidance.new_tensor(sigmas)
        keys = torch.cat([scaled, -0.5 * scaled.square().sum(-1, keepdim=True)], -1)
        centre = scaled[:, radius:-radius, radius:-radius]
        logits = window_correlation(torch.cat([centre, torch.ones_like(centre[..., :1])], -1), keys)
        logits = (logits - logits[..., radius, radius, None, None]).clamp_min(_LEAST_LOGIT)
        offsets = torch.arange(-radius, radius + 1, device=logits.device, dtype=logits.dtype).square()
        logits = logits - (offsets[:, None] + offsets) / (2 * space**2)
        return logits.flatten(-2).softmax(-1).view_as(logits)


def principal_scores(features: Tensor, count: int) -> Tensor:
    """One image's features ``[1, h, w, C]`` along their first principal components, of total variance 1.

    ``[1, h, w, count]``; zeros where there are fewer components. The signs of components do not matter to distances.
    """
    # An eigenvalue solver raises on what is not finite; the filtered features will show it.
    vectors = features[0].flatten(0, 1).double().nan_to_num(0.0, 0.0, 0.0)
    vectors = vectors - vectors.mean(0)
    # The smaller of the two matrices that have the same spectrum: of positions, or of channels.
    by_position = len(vectors) <= vectors.shape[1]
    values, basis = torch.linalg.eigh(vectors @ vectors.T if by_position else vectors.T @ vectors)
    values, basis = values[-count:].clamp_min(0), basis[:, -count:]
    scores = basis * values.sqrt() if by_position else vectors @ basis
    scores = scores * (len(vectors) / values.sum().clamp_min(1e-12)).sqrt()
    scores = functional.pad(scores, (0, count - scores.shape[1]))
    return scores.to(features.dtype).view(*features.shape[:3], count)

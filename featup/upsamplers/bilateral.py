"""Joint bilateral upsampling with a fixed kernel: it follows the image's edges and needs no training.

Kopf et al., Joint Bilateral Upsampling (SIGGRAPH 2007), applied as a stack of 2x stages like FeatUp's learned stack.
"""

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.kernels.window_correlation import window_correlation
from featup.upsamplers.joint import JointUpsampler

__all__ = ["Bilateral"]


class Bilateral(JointUpsampler):
    """Weights ``exp(-distance^2 / 2 sigma_space^2 - colour_distance^2 / 2 sigma_colour^2)``, normalised per window."""

    name = "bilateral"

    def __init__(
        self, sigma_space: float = 1.0, sigma_colour: float = 0.2, radius: int = 3, tile_pixels: int | None = None
    ) -> None:
        """
        Args:
            sigma_space: In pixels of the stage, above 0.
            sigma_colour: On RGB scaled to [-1, 1], above 0 (0.2 is about 25 grey levels of 255).
            radius, tile_pixels: See :class:`JointUpsampler`.

        Raises:
            GeometryError: a sigma that is not positive, or a radius below one.
        """
        super().__init__(radius, tile_pixels)
        if sigma_space <= 0 or sigma_colour <= 0:
            raise GeometryError(
                f"bilateral: sigma_space={sigma_space} and sigma_colour={sigma_colour} must both be positive"
            )
        self.sigma_space = sigma_space
        self.sigma_colour = sigma_colour

    def prepare_guidance(self, guidance: Tensor) -> Tensor:
        """From [0, 1] to [-1, 1]."""
        return guidance * 2 - 1

    def filters(self, stage: int, padded_guidance: Tensor) -> Tensor:
        """See :meth:`JointUpsampler.filters`; every stage has the same kernel."""
        radius = self.radius
        # -|p - q|^2 / 2s^2 = (p.q - |q|^2 / 2) / s^2 - |p|^2 / 2s^2: the first term is a correlation, and the
        # normalisation over the window cancels the second.
        scaled = padded_guidance / self.sigma_colour
        keys = torch.cat([scaled, -0.5 * scaled.square().sum(-1, keepdim=True)], -1)
        centre = scaled[:, radius:-radius, radius:-radius]
        logits = window_correlation(torch.cat([centre, torch.ones_like(centre[..., :1])], -1), keys)
        offsets = torch.arange(-radius, radius + 1, device=logits.device, dtype=logits.dtype).square()
        logits = logits - (offsets[:, None] + offsets) / (2 * self.sigma_space**2)
        return logits.flatten(-2).softmax(-1).view_as(logits)

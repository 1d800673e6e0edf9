"""CARAFE: kernels predicted from the features alone (Wang et al., ICCV 2019).

A trained baseline of FeatUp (section 4). The reassembly by the predicted kernels is in
:mod:`featup.upsamplers.reassembly`.
"""

import torch
from torch import Tensor, nn

from featup.upsamplers.reassembly import Reassembly

__all__ = ["CARAFE"]


class _CARAFEStage(nn.Module):
    """The kernel encoder of one stage."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.encode = nn.Conv2d(width, 4 * taps, 3)
        nn.init.normal_(self.encode.weight, std=0.001)
        # The initial kernel of a child is a narrow Gaussian at the child's position, 1/4 off its parent's centre.
        reach = (int(taps**0.5) - 1) // 2
        window = torch.arange(-reach, reach + 1.0)
        falloff = -(window - torch.tensor([[-0.25], [0.25]])).square() / (2 * 0.5**2)
        with torch.no_grad():
            self.encode.bias.copy_((falloff[:, None, :, None] + falloff[None, :, None, :]).flatten())  # type: ignore[union-attr]

    def forward(self, compressed: Tensor, image: Tensor, height: int, width: int) -> Tensor:
        """Logits ``[1, h, w, 2, 2, taps]`` from ``[1, h + 4, w + 4, width]``; the image is ignored."""
        logits = self.encode(compressed[:, 1:-1, 1:-1].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return logits.view(1, height, width, 2, 2, -1)  # type: ignore[no-any-return]


class CARAFE(Reassembly):
    """Content-aware reassembly of features (arXiv 1905.02188), once per 2x stage.

    The features are compressed to ``width`` channels. A 3x3 convolution maps them to the logits of the 5x5 kernels of
    each position's four children, and a softmax normalises the kernels. All stages share the compression. The initial
    kernels are Gaussians at the children's positions: a smooth interpolation. The image is not read.
    """

    name = "carafe"

    def __init__(self, channels: int, stages: int = 4, width: int = 64, tile_pixels: int | None = None) -> None:
        """
        Args:
            channels: Of the features.
            stages: Number of 2x stages: 4 for stride 16.
            width: Channels of the compressed features.
            tile_pixels: Most output positions whose kernels are held at once, by default chosen for the device.
        """
        super().__init__(channels, width, tile_pixels)
        self.stages = nn.ModuleList(_CARAFEStage(width, self.taps) for _ in range(stages))

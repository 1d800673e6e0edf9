"""SAPA: kernels from the similarity of image and features (Lu et al., NeurIPS 2022).

A trained baseline of FeatUp (section 4). The reassembly by the predicted kernels is in
:mod:`featup.upsamplers.reassembly`.
"""

import torch
from torch import Tensor, nn

from featup.kernels.window_correlation import window_correlation
from featup.upsamplers.reassembly import Reassembly

__all__ = ["SAPA"]


class _SAPAStage(nn.Module):
    """The embeddings of image and features of one stage, and their similarity."""

    def __init__(self, width: int, key_dim: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Conv2d(3, key_dim, 3), nn.GELU(), nn.Conv2d(key_dim, key_dim, 1))
        # Without biases: the softmax cancels a constant added to all keys of a window.
        self.key = nn.Sequential(nn.LayerNorm(width, bias=False), nn.Linear(width, key_dim, bias=False))
        self.scale = key_dim**-0.5

    def forward(self, compressed: Tensor, image: Tensor, height: int, width: int) -> Tensor:
        """Logits ``[1, h, w, 2, 2, taps]`` from ``[1, h + 4, w + 4, width]`` and ``[1, 2h + 2, 2w + 2, 3]``."""
        query = self.query(image.permute(0, 3, 1, 2) * 2 - 1).permute(0, 2, 3, 1) * self.scale
        keys = self.key(compressed)
        logits = [
            window_correlation(query[:, i::2, j::2].contiguous(), keys).flatten(-2) for i in range(2) for j in range(2)
        ]
        return torch.stack(logits, 3).view(1, height, width, 2, 2, -1)


class SAPA(Reassembly):
    """Similarity-aware point affiliation (arXiv 2209.12866), once per 2x stage.

    Two small convolutions embed the image at each child, and a linear layer embeds the features of the parent's 5x5
    window. The logits of the child's kernel are the products of the two embeddings. The original takes high-resolution
    features of an encoder in place of the image. The initial kernels are nearly uniform.
    """

    name = "sapa"

    def __init__(
        self,
        channels: int,
        stages: int = 4,
        width: int = 64,
        key_dim: int = 32,
        tile_pixels: int | None = None,
    ) -> None:
        """
        Args:
            channels: Of the features.
            stages: Number of 2x stages: 4 for stride 16.
            width: Channels of the compressed features, which all stages share.
            key_dim: Channels of the two embeddings.
            tile_pixels: Most output positions whose kernels are held at once, by default chosen for the device.
        """
        super().__init__(channels, width, tile_pixels)
        self.key_dim = key_dim
        self.stages = nn.ModuleList(_SAPAStage(width, key_dim) for _ in range(stages))

"""The backbone's features of jittered views of an image, and the random numbers that belong to the image."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.multiview.views import View, warp
from featup.training.objective import seeded

__all__ = ["image_generator", "view_features"]

_BATCH = 16


@torch.no_grad()
def view_features(backbone: Backbone, image: Tensor, views: Sequence[View], max_pad: int) -> Tensor:
    """The features of the views of one image, a batch of views at a time.

    Args:
        backbone: Frozen.
        image: uint8 ``[1, H, W, 3]``.
        views: ``V`` of them.
        max_pad: Of the jitter that they were sampled from.

    Returns:
        ``[V, h, w, C]``.
    """
    normalised = backbone.normalise(image).permute(0, 2, 3, 1)
    batches = []
    for start in range(0, len(views), _BATCH):
        batch = views[start : start + _BATCH]
        warped = warp(normalised.expand(len(batch), -1, -1, -1), batch, max_pad)
        batches.append(backbone.features(warped.permute(0, 3, 1, 2)))
    return torch.cat(batches)


def image_generator(seed: int, image: Tensor) -> torch.Generator:
    """A generator seeded by an image's pixels: the image's place in a batch or a data set makes no difference."""
    pixels = image.cpu().numpy()
    key = np.frombuffer(pixels.tobytes()[: pixels.size // 8 * 8], np.uint64)
    return seeded(seed, int(np.bitwise_xor.reduce(key)))

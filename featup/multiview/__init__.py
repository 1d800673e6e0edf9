"""Jittered views of an image, and upsamplers that compute the backbone's features of them for each image.

These, in ``average`` and ``implicit``, need timm and are imported from their modules.
"""

from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.multiview.options import FAST, PAPER, ImplicitOptions, MultiViewOptions
from featup.multiview.views import Jitter, View, to_image, to_view, warp

__all__ = [
    "FAST",
    "PAPER",
    "AttentionDownsampler",
    "BlurDownsampler",
    "ImplicitOptions",
    "Jitter",
    "MultiViewOptions",
    "View",
    "to_image",
    "to_view",
    "warp",
]

"""Jittered views of an image, and the per-image implicit fit to the backbone's features of them.

The fit, in ``implicit``, needs timm and is imported from its module.
"""

from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.multiview.options import FitOptions
from featup.multiview.views import Jitter, View, average_views, to_image, to_view, warp

__all__ = [
    "AttentionDownsampler",
    "BlurDownsampler",
    "FitOptions",
    "Jitter",
    "View",
    "average_views",
    "to_image",
    "to_view",
    "warp",
]

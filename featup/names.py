"""Names of upsamplers and kernels, for options and command lines. Imports nothing, so that they start fast."""

from typing import Literal

__all__ = ["PerImageName", "PublishedName", "TrainableName", "UpsamplerName"]

TrainableName = Literal["jbu", "resize_conv", "carafe", "sapa", "ifa"]
"""Upsamplers that are trained for one backbone, and always need a checkpoint."""
PublishedName = Literal["anyup"]
"""Upsamplers with a published checkpoint for all backbones, used where no other is given; they can be trained too."""
UpsamplerName = Literal[
    "nearest",
    "bilinear",
    "bicubic",
    "norm_bilinear",
    "guided_filter",
    "bilateral",
    "anyup",
    "jbu",
    "resize_conv",
    "carafe",
    "sapa",
    "ifa",
]
"""Feed-forward upsamplers."""
PerImageName = Literal["multiview", "implicit"]
"""Upsamplers that compute the backbone's features of many views of each image."""

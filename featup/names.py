"""Names of upsamplers and kernels, for options and command lines. Imports nothing, so that they start fast."""

from typing import Literal

__all__ = ["PerImageName", "PublishedName", "RangeKernel", "TrainableName", "UpsamplerName"]

TrainableName = Literal["jbu", "resize_conv", "carafe", "sapa", "ifa"]
PublishedName = Literal["anyup"]
"""Upsamplers with a published checkpoint for all backbones, which is used where no other is given."""
UpsamplerName = Literal[
    "nearest", "bilinear", "bicubic", "bilateral", "anyup", "jbu", "resize_conv", "carafe", "sapa", "ifa"
]
"""Feed-forward upsamplers."""
PerImageName = Literal["multiview", "implicit"]
"""Upsamplers that compute the backbone's features of many views of each image."""
RangeKernel = Literal["projection", "distance"]

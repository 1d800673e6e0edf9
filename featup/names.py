"""Names of upsamplers and kernels, for options and command lines. Imports nothing, so that they start fast."""

from typing import Literal

__all__ = ["FitBase", "PublishedName", "RangeKernel", "TrainableName", "UpsamplerName"]

TrainableName = Literal["jbu", "resize_conv", "carafe", "sapa", "ifa"]
PublishedName = Literal["anyup"]
"""Upsamplers with a published checkpoint for all backbones, which is used where no other is given."""
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
FitBase = Literal["bilinear", "bilateral", "jbu"]
RangeKernel = Literal["projection", "distance"]

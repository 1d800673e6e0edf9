"""Names of upsamplers and kernels, for options and command lines. Imports nothing, so that they start fast."""

from typing import Literal

__all__ = ["FitBase", "RangeKernel", "TrainableName", "UpsamplerName"]

TrainableName = Literal["jbu", "resize_conv", "carafe", "sapa", "ifa"]
UpsamplerName = Literal["nearest", "bilinear", "bicubic", "bilateral", "jbu", "resize_conv", "carafe", "sapa", "ifa"]
FitBase = Literal["bilinear", "bilateral", "jbu"]
RangeKernel = Literal["projection", "distance"]

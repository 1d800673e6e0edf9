"""Errors of the method, raised by every module of ``featup``.

FeatupError
├── GeometryError   (ValueError)    a size, stride, layer or option that cannot be served
├── ImageError      (ValueError)    an image that cannot be read, or whose layout or range is not clear
├── WeightsError    (ValueError)    a checkpoint that cannot be read or does not fit the model
└── BackendError    (RuntimeError)  a kernel backend that cannot run on this machine or tensor
"""

__all__ = ["BackendError", "FeatupError", "GeometryError", "ImageError", "WeightsError"]


class FeatupError(Exception):
    """Base of every error raised by ``featup``."""


class GeometryError(FeatupError, ValueError):
    """A size, stride, layer or option that cannot be served; the text names the values and the values that fit."""


class ImageError(FeatupError, ValueError):
    """An image that cannot be read, or whose layout or range is not clear; the text says how to give it."""


class WeightsError(FeatupError, ValueError):
    """Weights that cannot be read or do not fit the model; the text names the keys and shapes that differ."""


class BackendError(FeatupError, RuntimeError):
    """A kernel backend, chosen by name, that cannot run on this machine or tensor."""

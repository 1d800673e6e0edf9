"""Errors of the method.

FeatupError
├── GeometryError   (ValueError)    a size, stride or layer that cannot be served
├── WeightsError    (ValueError)    a checkpoint that does not fit the model it is loaded into
└── BackendError    (RuntimeError)  a kernel backend that was asked for and cannot run here
"""

__all__ = ["BackendError", "FeatupError", "GeometryError", "WeightsError"]


class FeatupError(Exception):
    """Base of every error raised by ``featup``."""


class GeometryError(FeatupError, ValueError):
    """A size, stride or layer that cannot be served; the text names the values and what would fit."""


class WeightsError(FeatupError, ValueError):
    """Weights that do not fit the model; the text names the keys and shapes that differ."""


class BackendError(FeatupError, RuntimeError):
    """A kernel backend that was asked for by name and cannot run on this machine or tensor."""

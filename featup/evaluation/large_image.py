"""Strided and large-image inference: finer features from more or larger forward passes of the backbone.

These are the baselines of FeatUp (arXiv 2403.10516, section 4) that need no upsampler.
"""

from math import floor

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.images import resize_images
from featup.kernels.resample import Taps, resample

__all__ = ["large_image_features", "strided_features"]


def strided_features(backbone: Backbone, images: Tensor, factor: int) -> Tensor:
    """Features of the images shifted by fractions of the stride, interleaved: ``factor ** 2`` forward passes.

    With ``a = (height, width)`` of the stride over ``factor``, result ``(y, x)`` is the feature of a patch whose centre
    is at pixel ``((y + 1/2) * a[0], (x + 1/2) * a[1])`` of the image, as in a map of stride ``a``. The image is
    reflected at its border. Fractional shifts, such as half a pixel for stride 14 and factor 2, interpolate linearly.

    Args:
        images: uint8 ``[B, H, W, 3]``.
        factor: Refinement in each direction, at least 1.

    Returns:
        ``[B, h * factor, w * factor, C]``, where ``h, w`` is the backbone's grid.

    Raises:
        GeometryError: a factor below one or finer than pixels, or images that do not fit the backbone.
    """
    _check_factor(factor, max(1, min(backbone.stride)))
    normalised = backbone.normalise(images).permute(0, 2, 3, 1)
    shifts = [[step * ((i + 0.5) / factor - 0.5) for i in range(factor)] for step in backbone.stride]
    down, across = (
        [_shifted(side, shift) for shift in along] for side, along in zip(normalised.shape[1:3], shifts, strict=True)
    )
    rows = [
        torch.stack([backbone.features(resample(normalised, y, x).permute(0, 3, 1, 2)) for x in across], 3).flatten(
            2, 3
        )
        for y in down
    ]
    return torch.stack(rows, 2).flatten(1, 2)


def large_image_features(backbone: Backbone, images: Tensor, factor: int) -> Tensor:
    """Features of the images resized to ``factor`` times their size (bicubic): one forward pass, a larger one.

    Args:
        images: uint8 ``[B, H, W, 3]``.
        factor: Refinement in each direction, at least 1.

    Returns:
        ``[B, h * factor, w * factor, C]``, where ``h, w`` is the backbone's grid.

    Raises:
        GeometryError: a factor below one, images of another kind, or a backbone that cannot take that size.
    """
    _check_factor(factor, None)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise GeometryError(
            f"images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}; scale floats in [0, 1] by 255"
        )
    size = (images.shape[1] * factor, images.shape[2] * factor)
    backbone.grid(size)
    return backbone(resize_images(images, size))  # type: ignore[no-any-return]


def _check_factor(factor: int, most: int | None) -> None:
    if factor < 1 or (most is not None and factor > most):
        limit = "at least 1" if most is None else f"from 1 to {most}, the stride in pixels"
        raise GeometryError(f"factor={factor}: features are refined by a whole factor, {limit}")


def _shifted(size: int, shift: float) -> Taps:
    """Taps that read an axis ``shift`` positions further on, linear between two, reflected at its ends."""
    whole = floor(shift)
    period = max(1, 2 * (size - 1))
    at = (torch.arange(size)[:, None] + torch.tensor([whole, whole + 1])).remainder(period)
    weight = torch.tensor([1 - (shift - whole), shift - whole]).repeat(size, 1)
    return Taps(torch.where(at < size, at, period - at), weight, size)

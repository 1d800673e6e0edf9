"""Resizing of images as tensors."""

from torch import Tensor
from torch.nn import functional

__all__ = ["resize_images"]


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images by antialiased bicubic interpolation.

    Args:
        images: uint8 ``[B, H, W, 3]``.
        size: (height, width) of the result.

    Returns:
        uint8 ``[B, height, width, 3]``; the same tensor if the images have that size.
    """
    if tuple(images.shape[1:3]) == tuple(size):
        return images
    planes = images.permute(0, 3, 1, 2).float()
    planes = functional.interpolate(planes, tuple(size), mode="bicubic", align_corners=False, antialias=True)
    # Bicubic interpolation overshoots the range of the pixels.
    return planes.round().clamp(0, 255).byte().permute(0, 2, 3, 1)

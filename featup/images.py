"""Images as tensors: reading them from the forms that users have them in, and resizing."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from featup.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageLike", "as_images", "resize_images"]

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor"
"""One image: a path, a Pillow image, or an array or tensor as :func:`as_images` describes it."""


def as_images(images: "ImageLike | Sequence[ImageLike]") -> tuple[list[Tensor], bool]:
    """Images in any of the forms below as uint8 ``[H, W, 3]``, and whether a batch was given.

    A path or a Pillow image is one image. Its EXIF rotation is applied; grey and palette images become RGB, pixels with
    alpha are composed with white, 16 bits become 8. Of animated files the first frame is read.

    An array or tensor of three dimensions is one image, of four a batch. The axis of length 3 is that of the colours:
    ``[H, W, 3]`` and ``[B, H, W, 3]``, or ``[3, H, W]`` and ``[B, 3, H, W]``. Its type gives the range: uint8 is 0 to
    255, floating point is 0 to 1 and is rounded to 8 bits. Tensors stay on their device.

    A list or tuple of single images is a batch, also of one; they may differ in form and size.

    Raises:
        ImageError: a file that is no image; an array with colours on both axes or on neither, of another type, or
            outside its range; an empty batch.
        FileNotFoundError: no such file.
    """
    if isinstance(images, list | tuple):
        if not images:
            raise ImageError("the list of images is empty; give at least one")
        singles = []
        for position, image in enumerate(images):
            converted, batched = as_images(image)
            if batched:
                raise ImageError(
                    f"item {position} of the list is a batch itself, a {_describe(image)}; give a list of single "
                    "images, or one array of four dimensions"
                )
            singles += converted
        return singles, True
    if isinstance(images, str | os.PathLike):
        return [_from_file(os.fspath(images))], False
    if isinstance(images, np.ndarray):
        # A copy: torch warns of arrays that are not writable, and takes no negative strides.
        if images.dtype.kind not in "uifb":
            _refuse(images)
        images = torch.from_numpy(images.copy())
    if isinstance(images, Tensor):
        return _from_tensor(images)
    from PIL import Image

    if isinstance(images, Image.Image):
        return [_from_pillow(images, "the image")], False
    _refuse(images)


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


def _refuse(images: Any) -> NoReturn:
    raise ImageError(
        f"cannot read an image from a {_describe(images)}; give a path, a PIL image, a numpy array or tensor [H, W, 3] "
        "or [3, H, W] (with a batch in front, if you like), or a list of them"
    )


def _from_tensor(tensor: Tensor) -> tuple[list[Tensor], bool]:
    shape = list(tensor.shape)
    first, last = tensor.ndim in (3, 4) and shape[-3] == 3, tensor.ndim in (3, 4) and shape[-1] == 3
    if first and last:
        raise ImageError(
            f"an array {shape} has 3 values on two axes, so it is not clear which of them are the colours; resize the "
            "image to another height or width, or give it as a PIL image: PIL.Image.fromarray(array [H, W, 3])"
        )
    if not (first or last):
        raise ImageError(
            f"an array {shape} is no image: it must be [H, W, 3] or [3, H, W], or a batch of these with a fourth axis "
            "in front. Convert grey images and alpha to RGB first: PIL.Image.fromarray(array).convert('RGB')"
        )
    if 0 in shape:
        raise ImageError(f"an array {shape} holds no pixels; give at least one image of at least one pixel")
    channels_last = tensor.detach().movedim(-3, -1) if first else tensor.detach()
    pixels = _eight_bits(channels_last)
    return (list(pixels), True) if tensor.ndim == 4 else ([pixels], False)


def _eight_bits(values: Tensor) -> Tensor:
    if values.dtype == torch.uint8:
        return values
    if not values.is_floating_point():
        raise ImageError(
            f"pixels of type {str(values.dtype).removeprefix('torch.')} have no defined white; give uint8 from 0 to "
            "255, or floating point from 0 to 1"
        )
    values = values.float()
    low, high = (float(value) for value in values.aminmax())
    if not (low >= 0 and high <= 1):
        if low < 0:
            cause = "images that are normalised already; give them as they were before, the model normalises them"
        elif high <= 255:
            cause = "pixels from 0 to 255; divide them by 255, or convert them to uint8"
        else:
            cause = "values that are no colours, or not finite"
        raise ImageError(f"pixels in floating point must be from 0 to 1, found {low:g} to {high:g}. Likely: {cause}")
    return (values * 255).round().byte()


def _from_file(path: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    if "://" in path:
        raise ImageError(f"{path} is a URL; download it and give the file, or a PIL image of its content")
    try:
        with Image.open(path) as image:
            return _from_pillow(image, path)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ImageError(f"{path} is no image that Pillow reads: {error}; convert it to PNG or JPEG") from error
    except OSError as error:
        if error.errno is not None:  # Missing, a folder, not readable: the system's own text says so.
            raise
        raise ImageError(f"{path} is damaged: {error}; write or download it again") from error


def _from_pillow(image: "Image.Image", source: str) -> Tensor:
    """uint8 [H, W, 3] of a Pillow image in any mode, as it is meant to be displayed."""
    from PIL import Image, ImageOps

    if image.mode in ("I", "F"):
        raise ImageError(
            f"{source} has 32-bit pixels (mode {image.mode}), which have no defined white; scale them to 0..255 and "
            "convert them to 8 bits"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) * 255 // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return torch.from_numpy(np.array(image.convert("RGB")))


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + (f" {list(shape)} of {dtype}" if shape is not None else "")

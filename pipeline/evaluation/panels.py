"""Pictures of an evaluation: class maps and depth in colours, side by side."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featup import pictures
from featup.pictures import class_colours, side_by_side, value_colours
from pipeline.training.class_names import class_palette
from pipeline.training.tasks import SegmentationTask, Task

__all__ = ["Panels", "Pixels", "colour", "contact_sheet", "sheet", "thumbnail"]


# In one line of a picture.
_PANELS = 5
# Width of a colour in a legend, in pixels.
_PATCH = 96
Pixels = NDArray[np.uint8]
# The panels of each picture, with their titles.
Panels = dict[str, list[tuple[str, Pixels]]]


def colour(task: Task, values: Tensor, label: Tensor, classes: Sequence[str] = ()) -> Pixels:
    """A prediction or a label ``[H, W]`` as colours, uint8 ``[H, W, 3]``.

    Args:
        task: Of the values.
        values: What to show.
        label: For depths: the map whose range the colours cover.
        classes: See :func:`pipeline.training.class_names.read_classes`.
    """
    if isinstance(task, SegmentationTask):
        return class_colours(values.numpy(), class_palette(task.classes, classes))
    known = label[task.known(label)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return value_colours(values.numpy(), low, high)


def sheet(panels: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Panels side by side, in lines of about the same length."""
    each = math.ceil(len(panels) / math.ceil(len(panels) / _PANELS))
    return pictures.sheet([side_by_side(panels[at : at + each]) for at in range(0, len(panels), each)])


def contact_sheet(strips: Sequence[Pixels], legend: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Strips, one an image, in columns, with the names of colours below.

    Args:
        strips: uint8 ``[H, W, 3]`` each, at least one.
        legend: (name, colour uint8 ``[3]``) of what is shown; none for no legend.
    """
    columns = max(1, round(math.sqrt(len(strips) * strips[0].shape[0] / strips[0].shape[1])))
    each = math.ceil(len(strips) / columns)
    table = _stack([_stack(strips[at : at + each], 0) for at in range(0, len(strips), each)], 1)
    if not legend:
        return table
    patches = [(name, np.tile(colour, (16, _PATCH, 1))) for name, colour in legend]
    across = max(1, table.shape[1] // (_PATCH + 16))
    lines = [side_by_side(patches[at : at + across], 16) for at in range(0, len(patches), across)]
    return _stack([table, *lines], 0)


def thumbnail(pixels: Pixels, height: int = 200) -> Pixels:
    """A photograph uint8 ``[H, W, 3]`` scaled to ``height`` pixels."""
    width = max(1, round(pixels.shape[1] * height / pixels.shape[0]))
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _stack(pictures: Sequence[Pixels], axis: Literal[0, 1]) -> Pixels:
    """Pictures below each other (axis 0) or side by side (axis 1), padded with white."""
    side = max(picture.shape[1 - axis] for picture in pictures)
    padding = [[(0, 0), (0, 0), (0, 0)] for _ in pictures]
    for pad, picture in zip(padding, pictures, strict=True):
        pad[1 - axis] = (0, side - picture.shape[1 - axis])
    padded = [np.pad(picture, pad, constant_values=255) for picture, pad in zip(pictures, padding, strict=True)]
    return np.concatenate(padded, axis)

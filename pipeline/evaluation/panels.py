"""Pictures of an evaluation: class maps and depth in colours, side by side."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featup import pictures
from featup.pictures import class_colours, side_by_side, value_colours
from pipeline.training.tasks import SegmentationTask, Task

__all__ = ["Panels", "colour", "sheet"]


# In one line of a picture.
_PANELS = 5
Pixels = NDArray[np.uint8]
# The panels of each picture, with their titles.
Panels = dict[str, list[tuple[str, Pixels]]]


def colour(task: Task, values: Tensor, label: Tensor) -> Pixels:
    """A prediction or a label ``[H, W]`` as colours; depths on the scale of the image's label."""
    if isinstance(task, SegmentationTask):
        return class_colours(values.numpy(), task.classes)
    known = label[task.known(label)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return value_colours(values.numpy(), low, high)


def sheet(panels: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Panels side by side, in lines of about the same length."""
    each = math.ceil(len(panels) / math.ceil(len(panels) / _PANELS))
    return pictures.sheet([side_by_side(panels[at : at + each]) for at in range(0, len(panels), each)])

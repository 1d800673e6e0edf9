"""Pictures of an evaluation: class maps and depth in colours, side by side."""

import colorsys
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featup.pictures import side_by_side
from pipeline.training.tasks import SegmentationTask, Task

__all__ = ["Panels", "class_colours", "colour", "sheet"]


# In one line of a picture.
_PANELS = 5
Pixels = NDArray[np.uint8]
# The panels of each picture, with their titles.
Panels = dict[str, list[tuple[str, Pixels]]]


def class_colours(ids: Tensor, classes: int) -> Pixels:
    """Class ids ``[H, W]`` as uint8 ``[H, W, 3]``: a colour for each, black for ids that are no class."""
    # The golden ratio spreads the hues of any number of classes.
    palette = [
        colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.9, 0.5)[k % 2], (1.0, 0.75)[k // 2 % 2]) for k in range(classes)
    ]
    colours = (np.array([*palette, (0, 0, 0)]) * 255).round().astype(np.uint8)
    numbers = ids.numpy()
    picked: Pixels = colours[np.where((numbers >= 0) & (numbers < classes), numbers, classes)]
    return picked


def colour(task: Task, values: Tensor, label: Tensor) -> Pixels:
    """A prediction or a label ``[H, W]`` as colours; depths on the scale of the image's label."""
    if isinstance(task, SegmentationTask):
        return class_colours(values, task.classes)
    known = label[task.known(label)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    scaled = ((values - low) / max(high - low, 1e-6)).clamp(0, 1)
    colours = matplotlib.colormaps["viridis"](scaled.nan_to_num(0).numpy())[..., :3]
    colours[~values.isfinite().numpy()] = 0
    shown: Pixels = (colours * 255).round().astype(np.uint8)
    return shown


def sheet(panels: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Panels side by side, in lines of about the same length."""
    each = math.ceil(len(panels) / math.ceil(len(panels) / _PANELS))
    lines = [side_by_side(panels[at : at + each]) for at in range(0, len(panels), each)]
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return np.concatenate(padded)

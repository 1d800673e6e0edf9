"""The maps of a timm model: which one a layer or stride names, and which image sizes fit its stride.

``maps`` is a sequence of (stride in pixels, channels), one for each layer; sizes are (height, width) in pixels.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

from featup.errors import GeometryError

__all__ = ["as_size", "check_fit", "choose_map", "finer_layers", "list_layers", "nearest_fit", "times"]


def choose_map(name: str, maps: Sequence[tuple[int, int]], layer: int, stride: int | None) -> int:
    """The index of the map that ``layer`` or ``stride`` names.

    Raises:
        GeometryError: there is none, or both are given; the text lists the layers.
    """
    table = list_layers(maps)
    if stride is None:
        if not -len(maps) <= layer < len(maps):
            raise GeometryError(f"{name} has no layer {layer}; its layers are {table}")
        return layer % len(maps)
    if layer != -1:
        raise GeometryError(f"layer={layer} and stride={stride} both choose a map; give one of them")
    matching = [index for index, (reduction, _) in enumerate(maps) if reduction == stride]
    if not matching:
        raise GeometryError(f"{name} has no layer of stride {stride}; its layers are {table}")
    return matching[-1]


def list_layers(maps: Sequence[tuple[int, int]], layers: Iterable[int] | None = None) -> str:
    """Layers with their stride and channels, as text; runs of equal ones together. By default all layers."""
    indices = list(range(len(maps)) if layers is None else layers)
    runs = [(list(run), geometry) for geometry, run in groupby(indices, maps.__getitem__)]
    return ", ".join(
        f"{run[0] if len(run) == 1 else f'{run[0]}-{run[-1]}'} (stride {reduction}, {channels} channels)"
        for run, (reduction, channels) in runs
    )


def finer_layers(maps: Sequence[tuple[int, int]], size: Sequence[int]) -> str:
    """What to give for images of ``size`` that do not fit the chosen layer: the deepest layer that they fit."""
    fitting = [i for i, (step, _) in enumerate(maps) if all(side >= step and side % step == 0 for side in size)]
    return f"give layer={fitting[-1]} (stride {maps[fitting[-1]][0]})" if fitting else "choose another model"


def check_fit(name: str, layer: int, stride: Sequence[int], size: Sequence[int], otherwise: str | None = None) -> None:
    """Refuse images of ``size`` that do not fit ``stride`` (height, width).

    Args:
        otherwise: What helps beside another size, for the text.

    Raises:
        GeometryError: with the nearest sizes that fit.
    """
    sides = list(zip(size, stride, strict=True))
    if any(side < step or side % step for side, step in sides):
        down = [max(side // step, 1) * step for side, step in sides]
        up = [max(-(-side // step), 1) * step for side, step in sides]
        nearest = " or ".join(dict.fromkeys((times(down), times(up))))
        raise GeometryError(
            f"images of {times(size)} (height x width) do not fit the stride {times(stride)} of {name}, "
            f"layer {layer}; crop, pad or resize them to {nearest}, or "
            + (otherwise or "choose a layer of a finer stride")
        )


def nearest_fit(size: tuple[float, float], stride: tuple[int, int]) -> tuple[int, int]:
    """The multiples of ``stride`` that are nearest to ``size``, and at least one stride."""
    height, width = (max(round(side / step), 1) * step for side, step in zip(size, stride, strict=True))
    return height, width


def as_size(values: Sequence[int] | int) -> tuple[int, int]:
    """(height, width) from a pair, or from one number for a square.

    Raises:
        GeometryError: anything else.
    """
    sides = (values, values) if isinstance(values, int) else tuple(values)
    if len(sides) != 2 or any(isinstance(side, bool) or int(side) != side for side in sides):
        raise GeometryError(f"a size must be (height, width) or one number for a square, got {values!r}")
    return int(sides[0]), int(sides[1])


def times(size: Sequence[int]) -> str:
    """``HEIGHTxWIDTH``."""
    return "x".join(map(str, size))

"""Pictures of features, classes and values: their colours, and panels side by side."""

import colorsys
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from featup.projection import PCAFit

__all__ = [
    "class_colours",
    "class_palette",
    "component_colours",
    "component_scale",
    "pca_colours",
    "scaled_colours",
    "sheet",
    "side_by_side",
    "value_colours",
]

Pixels = NDArray[np.uint8]
ColourScale = tuple[NDArray[np.floating], NDArray[np.floating]]
"""The smallest value of each of three channels, and by what the values above it are multiplied."""


def pca_colours(maps: Sequence[NDArray[np.floating]]) -> list[Pixels]:
    """Colour feature maps by their first three principal components.

    All maps share one basis and one scale: equal features have equal colours in all maps.

    Args:
        maps: Each ``[H, W, C]`` with the same ``C``; sizes may differ. Vectors that are not finite become black.

    Returns:
        uint8 ``[H, W, 3]`` for each map.
    """
    tensors = [torch.from_numpy(np.array(features, dtype=np.float32)) for features in maps]
    for features in tensors:
        # An infinite channel would get a colour and stretch the scale. NaN does neither.
        features[~features.isfinite().all(-1)] = torch.nan
    channels = tensors[0].shape[-1]
    fit = PCAFit(channels)
    for features in tensors:
        fit.add(features)
    components = min(3, channels)
    if fit.count <= components:
        return [np.zeros((*features.shape[:2], 3), dtype=np.uint8) for features in tensors]
    pca = fit.solve(components)
    return component_colours([pca.project(features).numpy() for features in tensors])


def component_colours(maps: Sequence[NDArray[np.floating]]) -> list[Pixels]:
    """Colour the first three channels of maps, as principal components are: all maps share one scale.

    Args:
        maps: Each ``[H, W, C]``; sizes may differ. What is not finite becomes black, and so do channels that lack.

    Returns:
        uint8 ``[H, W, 3]`` for each map.
    """
    scale = component_scale(maps)
    return [scaled_colours(one, scale) for one in maps]


def component_scale(maps: Sequence[NDArray[np.floating]]) -> ColourScale:
    """The scale of the first three channels of maps, on which :func:`scaled_colours` colours these and others.

    Args:
        maps: Each ``[H, W, C]``; sizes may differ. What is not finite does not count.
    """
    vectors = np.concatenate([_three_channels(one).reshape(-1, 3) for one in maps])
    # Percentiles, so that a few extreme vectors do not leave the rest grey.
    low, high = np.nanpercentile(vectors, [1, 99], axis=0)
    return low, 255 / np.maximum(high - low, 1e-12)


def scaled_colours(features: NDArray[np.floating], scale: ColourScale) -> Pixels:
    """The first three channels of a map ``[H, W, C]`` in colours, uint8 ``[H, W, 3]``; black where not finite."""
    low, factor = scale
    return np.nan_to_num(np.clip((_three_channels(features) - low) * factor, 0, 255)).astype(np.uint8)


def _three_channels(features: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.pad(features[..., :3], ((0, 0), (0, 0), (0, max(0, 3 - features.shape[-1]))))


def class_palette(classes: int) -> Pixels:
    """A colour for each class id, uint8 ``[classes, 3]``."""
    # The golden ratio spreads the hues of any number of classes.
    palette = [
        colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.9, 0.5)[k % 2], (1.0, 0.75)[k // 2 % 2]) for k in range(classes)
    ]
    colours: Pixels = (np.array(palette).reshape(-1, 3) * 255).round().astype(np.uint8)
    return colours


def class_colours(ids: NDArray[np.integer], palette: Pixels) -> Pixels:
    """Class ids ``[H, W]`` in the colours uint8 ``[K, 3]`` of the classes, as uint8 ``[H, W, 3]``; else black."""
    colours = np.concatenate([palette, np.zeros((1, 3), np.uint8)])
    picked: Pixels = colours[np.where((ids >= 0) & (ids < len(palette)), ids, len(palette))]
    return picked


def value_colours(values: NDArray[np.floating], low: float, high: float) -> Pixels:
    """Values ``[H, W]`` as uint8 ``[H, W, 3]``, from ``low`` to ``high`` dark to bright; black where not finite."""
    scaled = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    colours = matplotlib.colormaps["viridis"](np.nan_to_num(scaled))[..., :3]
    colours[~np.isfinite(values)] = 0
    pixels: Pixels = (colours * 255).round().astype(np.uint8)
    return pixels


def side_by_side(panels: Sequence[tuple[str, Pixels]], height: int = 336) -> Pixels:
    """Panels with their titles in one row, each scaled to ``height`` pixels without smoothing.

    Args:
        panels: (title, uint8 ``[H, W, 3]``) from left to right.
    """
    gap, bar = 8, 28
    scaled = [
        Image.fromarray(pixels).resize(
            (max(1, round(pixels.shape[1] * height / pixels.shape[0])), height), Image.Resampling.NEAREST
        )
        for _, pixels in panels
    ]
    sheet = Image.new("RGB", (sum(panel.width + gap for panel in scaled) + gap, height + bar + gap), "white")
    draw = ImageDraw.Draw(sheet)
    left = gap
    for (title, _), panel in zip(panels, scaled, strict=True):
        # A long title gets a smaller font, so that it does not run into the next title.
        size = 16.0
        while size > 6 and draw.textlength(title, font=ImageFont.load_default(size)) > panel.width:
            size -= 1
        draw.text((left, 5), title, fill="black", font=ImageFont.load_default(size))
        sheet.paste(panel, (left, bar))
        left += panel.width + gap
    return np.asarray(sheet)


def sheet(lines: Sequence[Pixels], columns: int = 1) -> Pixels:
    """Pictures below each other in so many columns, filled line by line, on white."""
    height, width = (max(one.shape[axis] for one in lines) for axis in (0, 1))
    padded = [
        np.pad(one, ((0, height - one.shape[0]), (0, width - one.shape[1]), (0, 0)), constant_values=255)
        for one in lines
    ]
    padded += [np.full_like(padded[0], 255)] * (-len(padded) % columns)
    return np.concatenate([np.concatenate(padded[at : at + columns], 1) for at in range(0, len(padded), columns)])

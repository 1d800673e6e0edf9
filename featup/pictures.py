"""Pictures of features: one PCA to colours for several maps of an image, and panels side by side."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from featup.projection import PCAFit

__all__ = ["pca_colours", "side_by_side"]

Pixels = NDArray[np.uint8]


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
    projected = [torch.nn.functional.pad(pca.project(features), (0, 3 - components)).numpy() for features in tensors]
    vectors = np.concatenate([colours.reshape(-1, 3) for colours in projected])
    # Percentiles, so that a few extreme vectors do not leave the rest grey.
    low, high = np.nanpercentile(vectors, [1, 99], axis=0)
    scale = 255 / np.maximum(high - low, 1e-12)
    return [np.nan_to_num(np.clip((colours - low) * scale, 0, 255)).astype(np.uint8) for colours in projected]


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

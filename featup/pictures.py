"""Pictures of features: a PCA to colours that several maps of one image share, and panels side by side."""

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

    All maps share one basis and one scale, so that equal features have equal colours in all of them.

    Args:
        maps: Each ``[H, W, C]`` with the same ``C``; sizes may differ. Vectors that are not finite come out black.

    Returns:
        uint8 ``[H, W, 3]`` for each map.
    """
    tensors = [torch.from_numpy(np.array(one, dtype=np.float32)) for one in maps]
    for one in tensors:
        # An infinite channel would be a colour, and the end of the scale; as NaN it is neither.
        one[~one.isfinite().all(-1)] = torch.nan
    channels = tensors[0].shape[-1]
    fit = PCAFit(channels)
    for one in tensors:
        fit.add(one)
    kept = min(3, channels)
    if fit.count <= kept:
        return [np.zeros((*one.shape[:2], 3), dtype=np.uint8) for one in tensors]
    pca = fit.solve(kept)
    projected = [torch.nn.functional.pad(pca.project(one), (0, 3 - kept)).numpy() for one in tensors]
    everything = np.concatenate([one.reshape(-1, 3) for one in projected])
    # Percentiles, so that a few extreme vectors do not leave the rest grey.
    low, high = np.nanpercentile(everything, [1, 99], axis=0)
    scale = 255 / np.maximum(high - low, 1e-12)
    return [np.nan_to_num(np.clip((one - low) * scale, 0, 255)).astype(np.uint8) for one in projected]


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
    sheet = Image.new("RGB", (sum(one.width + gap for one in scaled) + gap, height + bar + gap), "white")
    draw = ImageDraw.Draw(sheet)
    left = gap
    for (title, _), panel in zip(panels, scaled, strict=True):
        # A long title is set smaller, so that it does not run into the next one.
        size = 16.0
        while size > 6 and draw.textlength(title, font=ImageFont.load_default(size)) > panel.width:
            size -= 1
        draw.text((left, 5), title, fill="black", font=ImageFont.load_default(size))
        sheet.paste(panel, (left, bar))
        left += panel.width + gap
    return np.asarray(sheet)

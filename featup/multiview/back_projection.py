"""Back-projection: the residual between the multi-view average and a map's patch means, upsampled and added.

One step of iterative back-projection (Irani and Peleg, 1991). An edge-preserving upsampler averages over tokens and
may remove detail that the views agree on. The residual restores it, scaled by a blend weight chosen on validation
views. The upsampled residual is smooth, so the map's edges stay.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional

from featup.kernels.resample import interpolation_taps, resample
from featup.multiview.views import Jitter, View, warp
from featup.training.losses import explained_variance
from featup.upsamplers.base import ChannelMap

__all__ = ["add_residual", "blend_weight", "predict_views", "residual_of", "view_consistency"]

# Keys' a of the interpolated residual. The patch means of an interpolated map blur it, and a sharp cubic makes up for
# that.
_RESIDUAL_BICUBIC_A = -2.0


def view_consistency(maps: Tensor, views: Sequence[View], targets: Tensor, jitter: Jitter) -> Tensor:
    """Explained variance of views' features by a high-resolution map, where each token is the mean of its patch.

    Args:
        maps: ``[H, W, K]``, at the image's size.
        views: ``V`` views of the image.
        targets: Their coarse features ``[V, h, w, K]``.
        jitter: The distribution that the views were sampled from.

    Returns:
        See :func:`featup.training.losses.explained_variance`.
    """
    predicted = predict_views(maps, views, (targets.shape[1], targets.shape[2]), jitter)
    return explained_variance(predicted.double(), targets.double())


def residual_of(average: Tensor, maps: Tensor, channel_map: ChannelMap) -> Tensor:
    """The residual between the multi-view average and the patch means of its upsampled map.

    Args:
        average: ``[1, h, w, C]``.
        maps: ``[1, H, W, K]``, with the channel map applied.
        channel_map: From ``C`` to ``K`` channels.

    Returns:
        ``[1, h, w, K]``.
    """
    grid = (average.shape[1], average.shape[2])
    return functional.linear(average, channel_map.weight, channel_map.bias) - _patch_means(maps, grid)


def add_residual(maps: Tensor, residual: Tensor, weight: float) -> Tensor:
    """Maps ``[1, H, W, K]`` plus the bicubically upsampled residual ``[1, h, w, K]`` times a blend weight."""
    rows, cols = (
        interpolation_taps("bicubic", residual.shape[axis], maps.shape[axis], bicubic_a=_RESIDUAL_BICUBIC_A)
        for axis in (1, 2)
    )
    return maps + weight * resample(residual, rows, cols)


def blend_weight(margin: float, target: Tensor, initial: Tensor, corrected: Tensor, baseline: Tensor) -> float:
    """The smallest blend of two predictions whose squared error is below the baseline's, or else the best blend.

    The squared error of ``initial + weight * (corrected - initial)`` is a parabola of the weight. The result is its
    first crossing of the goal, or else its vertex, in [0, 1].

    Args:
        margin: The goal is ``1 - margin`` times the baseline's squared error.
        target, initial, corrected, baseline: Of one shape.
    """
    error, step = (target - initial).double(), (corrected - initial).double()
    excess = float(error.square().sum() - (1 - margin) * (target - baseline).double().square().sum())
    curvature, descent = float(step.square().sum()), float((error * step).sum())
    if excess <= 0 or descent <= 0:
        return 0.0
    discriminant = descent**2 - curvature * excess
    return min(1.0, (descent - sqrt(max(0.0, discriminant))) / curvature)


def predict_views(maps: Tensor, views: Sequence[View], grid: tuple[int, int], jitter: Jitter) -> Tensor:
    """Predicted features of views of a map ``[H, W, K]``: ``[V, h, w, K]``, each token the mean of its patch."""
    return torch.cat([_patch_means(warp(maps[None], [view], jitter.max_pad), grid) for view in views])


def _patch_means(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, H, W, K]`` to the means over the patches of a grid ``[B, h, w, K]``."""
    return functional.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)

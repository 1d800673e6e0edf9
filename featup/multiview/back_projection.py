"""Back-projection: the residual between the multi-view average and a map's patch means, upsampled and added.

One step of iterative back-projection (Irani and Peleg, 1991). An edge-preserving upsampler averages over tokens and
may remove detail that the views agree on. The residual restores it, scaled by a blend weight chosen on validation
views. The upsampled residual is smooth, so the map's edges stay.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional

from featup.kernels.resample import resample
from featup.multiview.fit import Fit, residual_taps
from featup.multiview.options import FitOptions
from featup.multiview.views import Jitter, View, warp
from featup.training.losses import explained_variance
from featup.upsamplers.base import ChannelMap
from featup.upsamplers.interpolate import Interpolate

__all__ = ["back_project", "blend_weight", "fit_patch_means", "view_consistency"]

# Of a map at the size of the image, of the channels that are evaluated together.
_PART_BYTES = 1 << 27


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
    predicted = _predict_views(maps, views, (targets.shape[1], targets.shape[2]), jitter)
    return explained_variance(predicted.double(), targets.double())


@torch.no_grad()
def back_project(
    fit: Fit,
    average: Tensor,
    features: Tensor,
    views: Sequence[View],
    targets: Tensor,
    options: FitOptions,
    size: tuple[int, int],
) -> Fit:
    """Set the residual of a fit, and its blend weight.

    Args:
        fit: With blend weight 0.
        average: Multi-view average of the training views' features ``[1, h, w, C]``, not renormalised.
        features: Single-view features of the image ``[1, h, w, C]``, whose bilinear interpolation is the baseline.
        views: All views of the image: training, validation and held out, in this order.
        targets: The backbone's features of the views, projected by the PCA, ``[V, h, w, K]``.
        options: Of the fit.
        size: (height, width) of the map that is compared on validation views.

    Returns:
        The fit with its residual; the same fit where the best blend weight is 0.
    """
    channel_map = fit.pca.as_channel_map().to(features)
    grid = (targets.shape[1], targets.shape[2])
    initial = fit.query(size)
    residual = functional.linear(average, channel_map.weight, channel_map.bias) - _patch_means(initial[None], grid)
    corrected = initial + resample(residual, *residual_taps(residual, size))[0]
    baseline = Interpolate("bilinear")(features, fit.image, size, channel_map)[0]
    validation = slice(options.training_views, options.views)
    predicted = (
        _predict_views(maps, views[validation], grid, options.jitter) for maps in (initial, corrected, baseline)
    )
    weight = blend_weight(options.margin, targets[validation], *predicted)
    if not weight:
        return fit
    return replace(fit, blend_weight=weight, residual=average - fit_patch_means(fit, grid, size))


def fit_patch_means(fit: Fit, grid: tuple[int, int], size: tuple[int, int], part_bytes: int = _PART_BYTES) -> Tensor:
    """Patch means of all channels of a fit's map, which is evaluated some channels at a time.

    Args:
        fit: To evaluate.
        grid: (height, width) of the patches.
        size: (height, width) of the map.
        part_bytes: Most bytes of the map that are held at once, at least those of one channel.

    Returns:
        ``[1, h, w, C]``.
    """
    identity = torch.eye(fit.features.shape[-1]).to(fit.features)
    parts = torch.split(identity, max(1, part_bytes // (4 * size[0] * size[1])))
    maps = (fit.query(size, projection=ChannelMap(part, part.new_zeros(len(part)))) for part in parts)
    return torch.cat([_patch_means(channels[None], grid) for channels in maps], -1)


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


def _predict_views(maps: Tensor, views: Sequence[View], grid: tuple[int, int], jitter: Jitter) -> Tensor:
    """Predicted features of views of a map ``[H, W, K]``: ``[V, h, w, K]``, each token the mean of its patch."""
    return torch.cat([_patch_means(warp(maps[None], [view], jitter.max_pad), grid) for view in views])


def _patch_means(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, H, W, K]`` to the means over the patches of a grid ``[B, h, w, K]``."""
    return functional.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)

"""How much of the features of views a map explains, and one step of back-projection of what it does not."""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from featup.kernels.resample import Taps, interpolation_taps, resample
from featup.multiview.views import Jitter, View, warp
from featup.training.losses import explained_variance
from featup.upsamplers.base import ChannelMap

if TYPE_CHECKING:
    from featup.multiview.implicit import Fit

__all__ = ["view_consistency"]


_MISSING_A = -2.0
# Of a map at the size of the image, with as many channels as that takes.
_PART_BYTES = 1 << 27


def view_consistency(maps: Tensor, views: Sequence[View], targets: Tensor, jitter: Jitter) -> Tensor:
    """How much of the backbone's features of views a high-resolution map explains, each token the mean of its patch.

    Args:
        maps: ``[H, W, K]``, at the image's size.
        views: ``V`` views of the image.
        targets: Their coarse features ``[V, h, w, K]``.
        jitter: What the views were drawn from.

    Returns:
        The share of variance explained; see :func:`featup.losses.explained_variance`.
    """
    seen = _seen(maps, views, (targets.shape[1], targets.shape[2]), jitter)
    return explained_variance(seen.double(), targets.double())


def _seen(maps: Tensor, views: Sequence[View], grid: tuple[int, int], jitter: Jitter) -> Tensor:
    """What ``maps [H, W, K]`` say of views: ``[V, h, w, K]``, a token the mean of its patch."""
    return torch.cat([_patch_means(warp(maps[None], [view], jitter.max_pad), grid) for view in views])


@torch.no_grad()
def back_project(
    fit: "Fit", means: Tensor, own: Tensor, views: Sequence[View], targets: Tensor, size: tuple[int, int]
) -> "Fit":
    """The fit with what its patches miss of the views' means, and the share of it that is to be added back.

    One step of iterative back-projection (Irani and Peleg, 1991), as far as views say that the fit has not seen. What
    is added has no detail: the edges of the map stay as they are.

    Args:
        fit: With nothing added back yet.
        means: What the views to fit to say together ``[1, h, w, C]``.
        own: The image's own coarse features ``[1, h, w, C]``.
        views: All views of the image, fitted to, judging and held out.
        targets: What the backbone says of them ``[V, h, w, K]``.
        size: (height, width) of the map that is judged.
    """
    upsampler, options = fit._upsampler, fit._upsampler.options
    total = upsampler.pca.as_channel_map().to(own)
    grid = (targets.shape[1], targets.shape[2])
    made = fit.query(size)
    missing = functional.linear(means, total.weight, total.bias) - _patch_means(made[None], grid)
    full = made + resample(missing, *residual_taps(missing, size))[0]
    alone = upsampler.plain(own, fit._image, size, total)[0]
    judges = slice(options.views - options.judges, options.views)
    seen = (_seen(maps, views[judges], grid, options.jitter) for maps in (made, full, alone))
    share = _least_share(options.margin, targets[judges], *seen)
    if not share:
        return fit
    # Of all channels, some at a time: the PCA does not hold everything that is missing.
    identity = torch.split(torch.eye(means.shape[-1]).to(means), max(1, _PART_BYTES // (4 * size[0] * size[1])))
    maps = (fit.query(size, projection=ChannelMap(some, some.new_zeros(len(some)))) for some in identity)
    return replace(
        fit, added_back=share, _missing=means - torch.cat([_patch_means(one[None], grid) for one in maps], -1)
    )


def residual_taps(missing: Tensor, size: tuple[int, int]) -> tuple[Taps, Taps]:
    """For what patches miss, at another size. Their means of what is interpolated are a blur of it: a slope sharper
    than usual makes up for that."""
    down, across = (
        interpolation_taps("bicubic", missing.shape[axis + 1], size[axis], bicubic_a=_MISSING_A) for axis in (0, 1)
    )
    return down, across


def _patch_means(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, H, W, K]`` to the means over the patches of a grid ``[B, h, w, K]``."""
    return functional.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


def _least_share(margin: float, wanted: Tensor, start: Tensor, end: Tensor, alone: Tensor) -> float:
    """The least share of the way from ``start`` to ``end`` that is nearer to ``wanted`` than ``alone``, or the nearest
    there is.

    All of one shape. The squared distance is to be less by a share of ``margin``. It is a parabola of the share: the
    first root, or else the vertex.
    """
    missing, way = (wanted - start).double(), (end - start).double()
    excess = float(missing.square().sum() - (1 - margin) * (wanted - alone).double().square().sum())
    bend, slope = float(way.square().sum()), float((missing * way).sum())
    if excess <= 0 or slope <= 0:
        return 0.0
    root = slope**2 - bend * excess
    return min(1.0, (slope - sqrt(max(0.0, root))) / bend)

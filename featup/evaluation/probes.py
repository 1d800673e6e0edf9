"""Linear probes: how well a linear map of the features predicts a label.

A segmentation probe is a softmax regression. On coarse features its targets are the shares of the classes in each
cell, so that a cell with an edge counts for both classes. On upsampled features they are the pixels' classes. A depth
probe is a ridge regression on metres. The mean depth of a cell is linear in its pixels' depths, as interpolation is; a
logarithm of depth would not be.

Both problems are convex with one solution, computed by L-BFGS and in closed form. The weight decay is chosen by
cross-validation over images. Pixels of one image are alike, so an image is never split between the two sides.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.upsamplers.base import ChannelMap

__all__ = ["Probe", "ProbeKind", "cell_depth", "cell_shares", "fit_depth", "fit_segmentation"]


ProbeKind = Literal["seg", "depth"]
# In half decades, strongest first, because each fit starts from the solution of the one before.
_SOFTMAX_DECAYS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
_RIDGE_DECAYS = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_FOLDS = 2
_ITERATIONS = 200
# The largest curvature of the cross-entropy along one score: p (1 - p) for p = 1 / 2.
_CURVATURE = 0.25


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe.

    Attributes:
        kind: ``seg`` predicts a score for each class, ``depth`` one channel in metres.
        channel_map: From features, of any resolution, to the prediction.
        weight_decay: The chosen one, for features scaled to variance 1.
        held_out: The loss on held-out images for each weight decay tried, down to the first at which it rises.
        vectors: Number of feature vectors it was fitted on.
    """

    kind: ProbeKind
    channel_map: ChannelMap
    weight_decay: float
    held_out: dict[float, float]
    vectors: int


def cell_shares(labels: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """The share of each class in the cells of a coarse map.

    Args:
        labels: Class ids ``[B, H, W]``; pixels with an id outside 0 to ``classes - 1`` belong to no class.
        grid: (height, width) of the coarse map, which divide those of the labels.

    Returns:
        float32 ``[B, h, w, K]``, summing to 1 where every pixel of the cell has a class.

    Raises:
        GeometryError: cells that are not whole pixels.
    """
    shares = []
    for cells in _cells(labels, grid):
        ids = cells.long()
        ids = torch.where((ids >= 0) & (ids < classes), ids, classes)
        shares.append(functional.one_hot(ids, classes + 1)[..., :classes].float().mean(2))
    return torch.stack(shares)


def cell_depth(depth: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean known depth of the cells of a coarse map, and the share of pixels with known depth.

    Args:
        depth: Metres ``[B, H, W]``; values that are not finite and positive are unknown.
        grid: (height, width) of the coarse map, which divide those of the labels.

    Returns:
        float32 ``[B, h, w, 2]``: mean, 0 for a cell without known depth, and share.

    Raises:
        GeometryError: cells that are not whole pixels.
    """
    cells = torch.stack(list(_cells(depth, grid)))
    known = cells.isfinite() & (cells > 0)
    total = torch.where(known, cells, 0.0).sum(-1)
    return torch.stack([total / known.sum(-1).clamp_min(1), known.float().mean(-1)], -1)


def fit_segmentation(
    features: Tensor, shares: Tensor, groups: Tensor, weight_decays: Sequence[float] = _SOFTMAX_DECAYS
) -> Probe:
    """Softmax regression, with the weight decay of the least cross-entropy on held-out images.

    Args:
        features: ``[M, C]``.
        shares: Of the classes in the cell of each vector, ``[M, K]``; vectors without any class are left out.
        groups: The image of each vector, ``[M]``.
        weight_decays: Candidates: weights of the squared weights against the mean cross-entropy.

    Raises:
        GeometryError: fewer than two images with labels.
    """
    used = shares.sum(1) > 0
    features, shares, groups = features[used].float(), shares[used].float(), groups[used]

    def fit(rows: Tensor, decays: Sequence[float]) -> Iterator[ChannelMap]:
        return _softmax_path(features[rows], shares[rows], decays)

    def loss(probe: ChannelMap, rows: Tensor) -> float:
        logs = functional.linear(features[rows], probe.weight, probe.bias).log_softmax(1)
        return -((logs * shares[rows]).sum() / shares[rows].sum()).item()

    return _cross_validate("seg", fit, loss, groups, sorted(weight_decays, reverse=True))


def fit_depth(features: Tensor, depth: Tensor, groups: Tensor, weight_decays: Sequence[float] = _RIDGE_DECAYS) -> Probe:
    """Ridge regression in closed form, with the weight decay of the least squared error on held-out images.

    Args:
        features: ``[M, C]``.
        depth: Metres, and the weight of each vector, ``[M, 2]``; vectors of weight 0 are left out.
        groups: The image of each vector, ``[M]``.
        weight_decays: Candidates: weights of the squared weights against the weighted mean of squared errors.

    Raises:
        GeometryError: fewer than two images with labels.
    """
    used = depth[:, 1] > 0
    features, depth, groups = features[used].double(), depth[used].double(), groups[used]

    def fit(rows: Tensor, decays: Sequence[float]) -> Iterator[ChannelMap]:
        return _ridge_path(features[rows], depth[rows, 0], depth[rows, 1], decays)

    def loss(probe: ChannelMap, rows: Tensor) -> float:
        errors = features[rows] @ probe.weight[0].double() + probe.bias.double() - depth[rows, 0]
        return (errors.square() @ depth[rows, 1] / depth[rows, 1].sum()).item()

    return _cross_validate("depth", fit, loss, groups, sorted(weight_decays, reverse=True))


def _cells(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, H, W]`` to ``[B, h, w, pixels of a cell]``."""
    count, height, width = labels.shape
    if height % grid[0] or width % grid[1]:
        raise GeometryError(
            f"labels of {height}x{width} (height x width) have no whole pixels in each cell of a {grid[0]}x{grid[1]} "
            "map; decode them at the size of the backbone's images"
        )
    steps = height // grid[0], width // grid[1]
    cells = labels.reshape(count, grid[0], steps[0], grid[1], steps[1])
    return cells.permute(0, 1, 3, 2, 4).flatten(3)


def _cross_validate(
    kind: ProbeKind,
    fit: Callable[[Tensor, Sequence[float]], Iterator[ChannelMap]],
    loss: Callable[[ChannelMap, Tensor], float],
    groups: Tensor,
    decays: Sequence[float],
) -> Probe:
    """Choose the weight decay by cross-validation, then fit on all vectors.

    Images are assigned to the folds in turn. Consecutive images are often alike, and folds of consecutive images would
    hold out whole classes.
    """
    images, number = torch.unique(groups, return_inverse=True)
    if len(images) < _FOLDS:
        raise GeometryError(
            f"probe: {len(images)} images with labels are too few, at least {_FOLDS} are needed to choose the weight "
            "decay. Likely cause: another set of classes, or labels that are all unknown"
        )
    folds = [number % _FOLDS == fold for fold in range(_FOLDS)]
    held_out: dict[float, float] = {}
    for decay, *probes in zip(decays, *(fit(~fold, decays) for fold in folds), strict=True):
        held_out[decay] = sum(loss(probe, fold) for probe, fold in zip(probes, folds, strict=True)) / _FOLDS
        # Smaller weight decays only fit the training images more closely, and take the most time.
        if held_out[decay] > min(held_out.values()):
            break
    best = min(held_out, key=lambda decay: held_out[decay])
    (probe,) = fit(torch.ones_like(number, dtype=torch.bool), [best])
    return Probe(kind, probe, best, held_out, len(groups))


def _softmax_path(features: Tensor, shares: Tensor, decays: Sequence[float]) -> Iterator[ChannelMap]:
    """The solutions for several weight decays, each computed from the one before."""
    mean, scale = features.mean(0), features.std().clamp_min(1e-12)
    inputs = (features - mean) / scale
    # The optimiser works along the principal axes, each scaled so that the loss curves alike along all. It then takes
    # fewer steps than in the channels, where hundreds are needed, to the same solution.
    variances, axes = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    inputs = inputs @ axes
    total, classes = shares.sum(), shares.shape[1]
    weight, bias = inputs.new_zeros(classes, len(variances)), inputs.new_zeros(classes)
    for decay in decays:
        units = (variances.clamp_min(0) * _CURVATURE + 2 * decay).rsqrt()
        steps = (weight / units).requires_grad_()
        bias.requires_grad_()
        optimiser = torch.optim.LBFGS(
            [steps, bias],
            max_iter=_ITERATIONS,
            history_size=20,
            tolerance_grad=1e-5,
            tolerance_change=1e-6,
            line_search_fn="strong_wolfe",
        )

        def loss(
            decay: float = decay,
            units: Tensor = units,
            steps: Tensor = steps,
            bias: Tensor = bias,
            optimiser: torch.optim.Optimizer = optimiser,
        ) -> Tensor:
            optimiser.zero_grad()
            weight = steps * units
            logs = functional.linear(inputs, weight, bias).log_softmax(1)
            value = decay * weight.square().sum() - (logs * shares).sum() / total
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimiser.step(loss)  # type: ignore[no-untyped-call]
        weight, bias = steps.detach() * units, bias.detach()
        unscaled = weight @ axes.T / scale
        yield ChannelMap(unscaled, bias - unscaled @ mean)


def _ridge_path(features: Tensor, depth: Tensor, weights: Tensor, decays: Sequence[float]) -> Iterator[ChannelMap]:
    """The solutions for several weight decays, by one decomposition."""
    weights = weights / weights.sum()
    mean, level = weights @ features, weights @ depth
    inputs = features - mean
    scale = inputs.square().mean().sqrt().clamp_min(1e-12)
    inputs = inputs / scale
    values, vectors = torch.linalg.eigh(inputs.T @ (inputs * weights[:, None]))
    moments = vectors.T @ (inputs.T @ (weights * (depth - level)))
    for decay in decays:
        weight = vectors @ (moments / (values + decay)) / scale
        yield ChannelMap(weight[None].float(), (level - weight @ mean)[None].float())

"""Linear probes on features: how much of a label a linear map of them tells.

A segmentation probe is a softmax regression: fitted on coarse features, against the share of each class in a feature's
cell (so that a cell with an edge in it counts for both sides), or on upsampled features, against a pixel's class. A
depth probe is a ridge regression on metres: the mean depth of a cell is linear in its pixels' depths, as interpolation
is, which a logarithm is not.

Both are convex problems with one solution, found by L-BFGS and in closed form, and the weight decay is chosen by
cross-validation over images: pixels of one image look alike, so they are never on both sides.
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
# In half decades about where the best ones of backbones lie, the strongest first: each fit begins at the last one's.
_SOFTMAX_DECAYS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
_RIDGE_DECAYS = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_FOLDS = 2
_ITERATIONS = 200
# The most that the cross-entropy can curve along one score: p (1 - p) for p = 1 / 2.
_CURVATURE = 0.25


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe.

    Attributes:
        kind: ``seg`` gives a score for each class, ``depth`` one channel in metres.
        channel_map: From features to that; applies to features of any resolution.
        weight_decay: What was chosen, for features scaled to variance 1.
        held_out: The loss on images left out, for each weight decay that was tried: down to where it rises again.
        vectors: How many feature vectors it was fitted on.
    """

    kind: ProbeKind
    channel_map: ChannelMap
    weight_decay: float
    held_out: dict[float, float]
    vectors: int


def cell_shares(labels: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """The share of each class in the cells of a coarse map.

    Args:
        labels: Class ids ``[B, H, W]``; pixels with other ids than 0 to ``classes - 1`` belong to no class.
        grid: (height, width) of the coarse map, which divide those of the labels.

    Returns:
        float32 ``[B, h, w, K]``, summing to 1 where every pixel of the cell has a class.

    Raises:
        GeometryError: cells that are not whole pixels.
    """
    shares = []
    for one in _cells(labels, grid):
        ids = one.long()
        ids = torch.where((ids >= 0) & (ids < classes), ids, classes)
        shares.append(functional.one_hot(ids, classes + 1)[..., :classes].float().mean(2))
    return torch.stack(shares)


def cell_depth(depth: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean known depth of the cells of a coarse map, and the share of their pixels where it is known.

    Args:
        depth: Metres ``[B, H, W]``; what is not finite and positive is unknown.
        grid: (height, width) of the coarse map, which divide those of the labels.

    Returns:
        float32 ``[B, h, w, 2]``: mean, 0 where nothing is known, and share.

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
    """Softmax regression, with the weight decay of the least cross-entropy on images left out.

    Args:
        features: ``[M, C]``.
        shares: Of the classes in each, ``[M, K]``; vectors without any are left out.
        groups: The image each comes from, ``[M]``.
        weight_decays: To choose from, on the squared weights, beside the mean cross-entropy.

    Raises:
        GeometryError: less than two images with labels.
    """
    used = shares.sum(1) > 0
    features, shares, groups = features[used].float(), shares[used].float(), groups[used]

    def fit(rows: Tensor, decays: Sequence[float]) -> Iterator[ChannelMap]:
        return _softmax_path(features[rows], shares[rows], decays)

    def loss(probe: ChannelMap, rows: Tensor) -> float:
        logs = functional.linear(features[rows], probe.weight, probe.bias).log_softmax(1)
        return -((logs * shares[rows]).sum() / shares[rows].sum()).item()

    return _chosen("seg", fit, loss, groups, sorted(weight_decays, reverse=True))


def fit_depth(features: Tensor, depth: Tensor, groups: Tensor, weight_decays: Sequence[float] = _RIDGE_DECAYS) -> Probe:
    """Ridge regression in closed form, with the weight decay of the least squared error on images left out.

    Args:
        features: ``[M, C]``.
        depth: Metres, and the weight of each vector, ``[M, 2]``; those of weight 0 are left out.
        groups: The image each comes from, ``[M]``.
        weight_decays: To choose from, on the squared weights, beside the weighted mean of squared errors.

    Raises:
        GeometryError: less than two images with labels.
    """
    used = depth[:, 1] > 0
    features, depth, groups = features[used].double(), depth[used].double(), groups[used]

    def fit(rows: Tensor, decays: Sequence[float]) -> Iterator[ChannelMap]:
        return _ridge_path(features[rows], depth[rows, 0], depth[rows, 1], decays)

    def loss(probe: ChannelMap, rows: Tensor) -> float:
        errors = features[rows] @ probe.weight[0].double() + probe.bias.double() - depth[rows, 0]
        return (errors.square() @ depth[rows, 1] / depth[rows, 1].sum()).item()

    return _chosen("depth", fit, loss, groups, sorted(weight_decays, reverse=True))


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


def _chosen(
    kind: ProbeKind,
    fit: Callable[[Tensor, Sequence[float]], Iterator[ChannelMap]],
    loss: Callable[[ChannelMap, Tensor], float],
    groups: Tensor,
    decays: Sequence[float],
) -> Probe:
    """Cross-validate, then fit on everything.

    Every other image is left out, as images that follow each other are often of one kind: of runs of them, whole
    classes would be.
    """
    images, number = torch.unique(groups, return_inverse=True)
    if len(images) < _FOLDS:
        raise GeometryError(
            f"probe: {len(images)} images with labels are too few, at least {_FOLDS} are needed to choose the weight "
            "decay. Likely cause: another set of classes, or labels that are all unknown"
        )
    left_out = [number % _FOLDS == fold for fold in range(_FOLDS)]
    held_out: dict[float, float] = {}
    for decay, *probes in zip(decays, *(fit(~out, decays) for out in left_out), strict=True):
        held_out[decay] = sum(loss(probe, out) for probe, out in zip(probes, left_out, strict=True)) / _FOLDS
        # Weaker ones only fit what is left in more closely, and are the slow ones to fit.
        if held_out[decay] > min(held_out.values()):
            break
    best = min(held_out, key=lambda decay: held_out[decay])
    (probe,) = fit(torch.ones_like(number, dtype=torch.bool), [best])
    return Probe(kind, probe, best, held_out, len(groups))


def _softmax_path(features: Tensor, shares: Tensor, decays: Sequence[float]) -> Iterator[ChannelMap]:
    """The solutions for several weight decays, each found from the one before."""
    mean, scale = features.mean(0), features.std().clamp_min(1e-12)
    inputs = (features - mean) / scale
    # Along the principal axes, each in the unit that makes the loss about as curved there as along the others: fewer
    # steps then do for what takes hundreds in the channels themselves. The solution is the same.
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

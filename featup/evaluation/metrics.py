"""Metrics of segmentation, depth and class activation maps, and bootstrap intervals of their differences.

Every metric of a set is computed from statistics that add up over its images and are stored per image. The batch size
therefore makes no difference, and a bootstrap can resample the images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from featup.errors import GeometryError

__all__ = [
    "Interval",
    "average_drop",
    "average_increase",
    "bootstrap",
    "class_counts",
    "depth_accuracy",
    "depth_rmse",
    "depth_sums",
    "difference_interval",
    "mean_iou",
    "pixel_accuracy",
]


def class_counts(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """The diagonal and the margins of every image's confusion matrix, from which IoU and accuracy follow.

    Args:
        prediction: Class ids from 0 to ``classes - 1``, ``[B, H, W]``.
        target: Class ids ``[B, H, W]``. Pixels with another id are unlabelled and do not count, whatever their
            prediction is.
        classes: K.

    Returns:
        int64 ``[B, 3, K]``: pixels where prediction and target are the class, where the prediction is, and where the
        target is.

    Raises:
        GeometryError: shapes that differ.
    """
    if prediction.shape != target.shape:
        raise GeometryError(
            f"metrics: predictions {list(prediction.shape)} and labels {list(target.shape)} must have one shape; "
            "upsample to the size of the labels"
        )
    counts = []
    for ours, truth in zip(prediction, target.long(), strict=True):
        known = (truth >= 0) & (truth < classes)
        right = truth[known & (ours == truth)]
        counts.append(
            torch.stack([torch.bincount(ids, minlength=classes) for ids in (right, ours[known], truth[known])])
        )
    return torch.stack(counts)


def mean_iou(counts: Tensor) -> float:
    """Mean intersection over union of the classes that occur in the labels, in percent.

    Args:
        counts: ``[..., 3, K]`` of :func:`class_counts`, summed here over all images; NaN where no pixel has a label.
    """
    both, ours, truth = counts.reshape(-1, *counts.shape[-2:]).sum(0).double()
    occurs = truth > 0
    return float(100 * (both / (ours + truth - both))[occurs].mean())


def pixel_accuracy(counts: Tensor) -> float:
    """Share of labelled pixels whose prediction is right, in percent; ``counts`` as :func:`mean_iou` takes them."""
    both, _, truth = counts.reshape(-1, *counts.shape[-2:]).sum(0).double().sum(-1)
    return float(100 * both / truth)


def depth_sums(prediction: Tensor, target: Tensor, minimum: float = 1e-3) -> Tensor:
    """The statistics of every image from which :func:`depth_rmse` and :func:`depth_accuracy` follow.

    Args:
        prediction: Metres, ``[B, H, W]``; less than ``minimum`` counts as ``minimum``, as no depth is negative.
        target: Metres, ``[B, H, W]``; values that are not finite and positive are unknown and do not count.
        minimum: Metres.

    Returns:
        float64 ``[B, 3]``: the sum of squared errors, the pixels within a factor of 1.25, the pixels known.

    Raises:
        GeometryError: shapes that differ.
    """
    if prediction.shape != target.shape:
        raise GeometryError(
            f"metrics: depths {list(prediction.shape)} and labels {list(target.shape)} must have one shape; upsample "
            "to the size of the labels"
        )
    ours, truth = prediction.double().clamp_min(minimum), target.double()
    known = truth.isfinite() & (truth > 0)
    truth = truth.where(known, 1.0)
    error = torch.where(known, (ours - truth).square(), 0.0)
    close = known & (torch.maximum(ours / truth, truth / ours) < 1.25)
    return torch.stack([error.sum((1, 2)), close.sum((1, 2)).double(), known.sum((1, 2)).double()], 1)


def depth_rmse(sums: Tensor) -> float:
    """Root of the mean squared error over all known pixels, in metres; ``sums`` ``[..., 3]`` of :func:`depth_sums`."""
    error, _, known = sums.reshape(-1, 3).sum(0)
    return float((error / known).sqrt())


def depth_accuracy(sums: Tensor) -> float:
    """Share of known pixels within a factor of 1.25 of the truth, in percent; ``sums`` as :func:`depth_rmse`."""
    _, close, known = sums.reshape(-1, 3).sum(0)
    return float(100 * close / known)


def average_drop(scores: Tensor, map_scores: Tensor) -> float:
    """Average drop of Grad-CAM++ (Chattopadhyay et al., WACV 2018, section 5.1), in percent; less is better.

    The mean of ``max(0, Y - O) / Y``: the share of a class's probability that is lost when the explanation map
    replaces the image.

    Args:
        scores: ``Y``, probabilities of the class for the image, ``[N]``.
        map_scores: ``O``, for the explanation map: the image times the activation map, ``[N]``.
    """
    return 100 * ((scores - map_scores).clamp_min(0) / scores).double().mean().item()


def average_increase(scores: Tensor, map_scores: Tensor) -> float:
    """Average increase of Grad-CAM++, in percent; more is better: the share of images whose probability grows.

    Arguments as for :func:`average_drop`.
    """
    return 100 * (map_scores > scores).double().mean().item()


@dataclass(frozen=True)
class Interval:
    """A difference: its mean over the resamples, and their 2.5% and 97.5% quantiles."""

    mean: float
    low: float
    high: float


def bootstrap(
    measure: Callable[[Tensor], float],
    statistics: Tensor,
    resamples: int = 200,
    clusters: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """A metric's values over resamples of the images of a set, drawn with replacement.

    Equal numbers of images, clusters and seed give equal resamples. The values of two methods are therefore paired, and
    images that are hard for both do not widen the interval of their difference.

    Args:
        measure: A metric of statistics of images, such as :func:`mean_iou`.
        statistics: Of the images, ``[N, ...]``.
        resamples: R.
        clusters: The cluster of each image, int64 ``[N]``, such as the sequence that a frame is of. Clusters are
            resampled as a whole (cluster bootstrap), because frames of one sequence are not independent. By default
            every image is a cluster of its own.
        seed: The only source of chance.

    Returns:
        float64 ``[R]``.

    Raises:
        GeometryError: clusters that are not one for each image.
    """
    if clusters is not None and clusters.shape != statistics.shape[:1]:
        raise GeometryError(
            f"bootstrap: {list(clusters.shape)} clusters of {len(statistics)} images; give one for each"
        )
    generator = torch.Generator().manual_seed(seed)
    names = [] if clusters is None else sorted(set(clusters.tolist()))
    members = None if clusters is None else [torch.nonzero(clusters == name)[:, 0] for name in names]
    count = len(statistics) if members is None else len(members)
    values = []
    for _ in range(resamples):
        resample = torch.randint(count, (count,), generator=generator)
        if members is not None:
            resample = torch.cat([members[number] for number in resample.tolist()])
        values.append(measure(statistics[resample]))
    return torch.tensor(values, dtype=torch.float64)


def difference_interval(ours: Tensor, baseline: Tensor) -> Interval:
    """The interval of a difference, from two methods' values over the same resamples, ``[R]`` each.

    A resample without a value, such as one whose images have no labels, does not count.
    """
    differences = ours - baseline
    differences = differences[differences.isfinite()]
    if not len(differences):
        return Interval(math.nan, math.nan, math.nan)
    low, high = differences.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(differences.mean().item(), low, high)

"""The tasks of linear probes, segmentation and depth: targets from labels, predictions from outputs, and measures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from featup.evaluation import metrics
from featup.evaluation.probes import Probe, ProbeKind, cell_depth, cell_shares, fit_depth, fit_segmentation
from pipeline.errors import ConfigError

__all__ = ["DepthTask", "SegmentationTask", "Task", "sample_indices"]


class Task(Protocol):
    """What a probe predicts: how labels become targets, predictions statistics, and statistics measures.

    Statistics are kept image by image, ``[B, ...]``, as :mod:`featup.evaluation.metrics` has them.
    """

    @property
    def kind(self) -> ProbeKind:
        """Also the label's name in a store and in a shard."""
        ...

    @property
    def channels(self) -> int:
        """Of a probe's output."""
        ...

    @property
    def measures(self) -> Mapping[str, Callable[[Tensor], float]]:
        """Functions from statistics to a number, by name; the first measure is compared with a baseline."""
        ...

    def prepare(self, labels: Tensor) -> Tensor:
        """Prepared labels from decoded ones, ``[...]``; prepared labels stay as they are."""
        ...

    def known(self, labels: Tensor) -> Tensor:
        """Where a prepared label is known: bool ``[...]``."""
        ...

    def cells(self, labels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Prepared labels ``[B, H, W]`` to targets of the cells of a coarse map, ``[B, h, w, T]``."""
        ...

    def points(self, labels: Tensor) -> Tensor:
        """Prepared labels of single pixels, ``[M]``, to targets ``[M, T]``."""
        ...

    def fit(self, features: Tensor, targets: Tensor, groups: Tensor) -> Probe:
        """A probe from features ``[M, C]``, targets ``[M, T]`` and the image of each, ``[M]``."""
        ...

    def decide(self, output: Tensor) -> Tensor:
        """A probe's output ``[B, H, W, channels]`` to the prediction, ``[B, H, W]``."""
        ...

    def statistics(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Of predictions ``[B, H, W]`` and prepared labels ``[B, H, W]``: ``[B, ...]``."""
        ...


@dataclass(frozen=True)
class SegmentationTask:
    """A class for every pixel; prepared labels are class ids, int32, and -1 where there is none."""

    classes: int
    ignore_index: int = 255
    fill: int = 255
    kind: ProbeKind = "seg"

    @property
    def channels(self) -> int:
        """A score for each class."""
        return self.classes

    @property
    def measures(self) -> Mapping[str, Callable[[Tensor], float]]:
        """In percent."""
        return {"mIoU": metrics.mean_iou, "accuracy": metrics.pixel_accuracy}

    def prepare(self, labels: Tensor) -> Tensor:
        """See :meth:`Task.prepare`.

        Raises:
            ConfigError: a class id that is not one of the classes, not the ignored one and not the filling one.
        """
        ids = labels.int()
        ids = torch.where((ids == self.ignore_index) | (ids == self.fill), -1, ids)
        if (ids >= self.classes).any():
            raise ConfigError(
                f"class id {int(ids.max())} with classes={self.classes} and ignore_index={self.ignore_index}; give the "
                "number of classes, from 0 on, and the id of pixels without one"
            )
        return ids

    def known(self, labels: Tensor) -> Tensor:
        """See :meth:`Task.known`."""
        return labels >= 0

    def cells(self, labels: Tensor, grid: tuple[int, int]) -> Tensor:
        """See :meth:`Task.cells`: the share of each class."""
        return cell_shares(labels, grid, self.classes)

    def points(self, labels: Tensor) -> Tensor:
        """See :meth:`Task.points`: 1 for the class, 0 for the others; all 0 where there is none."""
        ids = torch.where(labels >= 0, labels, self.classes).long()
        return functional.one_hot(ids, self.classes + 1)[:, :-1].float()

    def fit(self, features: Tensor, targets: Tensor, groups: Tensor) -> Probe:
        """See :meth:`Task.fit`."""
        return fit_segmentation(features, targets, groups)

    def decide(self, output: Tensor) -> Tensor:
        """See :meth:`Task.decide`: the class with the highest score."""
        return output.argmax(-1)

    def statistics(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`Task.statistics`."""
        return metrics.class_counts(prediction, labels, self.classes)


@dataclass(frozen=True)
class DepthTask:
    """Metres for every pixel; prepared labels are float32, and NaN where depth is unknown."""

    kind: ProbeKind = "depth"
    channels: int = 1

    @property
    def measures(self) -> Mapping[str, Callable[[Tensor], float]]:
        """Metres, and percent."""
        return {"RMSE": metrics.depth_rmse, "delta 1.25": metrics.depth_accuracy}

    def prepare(self, labels: Tensor) -> Tensor:
        """See :meth:`Task.prepare`."""
        depth = labels.float()
        return depth.where(depth.isfinite() & (depth > 0), torch.nan)

    def known(self, labels: Tensor) -> Tensor:
        """See :meth:`Task.known`."""
        return labels.isfinite()

    def cells(self, labels: Tensor, grid: tuple[int, int]) -> Tensor:
        """See :meth:`Task.cells`: the mean, and the share that is known."""
        return cell_depth(labels, grid)

    def points(self, labels: Tensor) -> Tensor:
        """See :meth:`Task.points`: the depth, and 1 where it is known."""
        known = self.known(labels)
        return torch.stack([labels.where(known, 0.0), known.float()], 1)

    def fit(self, features: Tensor, targets: Tensor, groups: Tensor) -> Probe:
        """See :meth:`Task.fit`."""
        return fit_depth(features, targets, groups)

    def decide(self, output: Tensor) -> Tensor:
        """See :meth:`Task.decide`: the only channel."""
        return output[..., 0]

    def statistics(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`Task.statistics`."""
        return metrics.depth_sums(prediction, labels)


def sample_indices(count: int, most: int, seed: int) -> Tensor:
    """``most`` of ``count`` indices, chosen by a seed and ascending; all of them where there are no more."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values

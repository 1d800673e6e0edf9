"""Linear probes at data-set scale: the labels they are fitted on, and probes fitted on and evaluated over a store."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from featup import metrics
from featup.checkpoints import probe_bytes
from featup.probes import Probe, ProbeKind, cell_depth, cell_shares, fit_depth, fit_segmentation
from pipeline import storage
from pipeline.config import ProbeConfig, describe
from pipeline.errors import ConfigError, InputError
from pipeline.featurize import set_threads
from pipeline.loader import FeatureDataset
from pipeline.store import feature_space, list_differences, stored_config, stored_layout

__all__ = [
    "DepthTask",
    "PixelDraw",
    "SegmentationTask",
    "Task",
    "draw_rows",
    "evaluate_store",
    "fit_store",
    "train_probe",
]


class Task(Protocol):
    """What a probe is for: how labels become targets, predictions statistics, and those numbers.

    Statistics are kept image by image, ``[B, ...]``, as :mod:`featup.metrics` has them.
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
        """Name of a number -> what computes it from statistics; the first one is compared with a baseline."""
        ...

    def prepare(self, labels: Tensor) -> Tensor:
        """Labels as decoded, ``[...]``, to those the rest takes; prepared ones stay as they are."""
        ...

    def known(self, labels: Tensor) -> Tensor:
        """Where prepared labels ``[...]`` say something: bool ``[...]``."""
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


def draw_rows(count: int, most: int, seed: int) -> Tensor:
    """``most`` of ``count`` indices by a seed, in order; all of them where they are no more."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


@dataclass(frozen=True)
class PixelDraw:
    """A transform of :class:`FeatureDataset`: keeps some labelled pixels of an image, drawn by the seed and its row.

    Only they travel from a reading process to the one that fits. ``features`` becomes ``[P, C]`` and the label ``[P]``;
    where an image has fewer labelled pixels than ``P``, those that are left over have no label.
    """

    task: Task
    pixels: int
    seed: int

    def __call__(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """One sample of the dataset."""
        labels = self.task.prepare(sample[self.task.kind]).flatten()
        known = self.task.known(labels).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(sample["row"]))
        drawn = known[torch.randperm(len(known), generator=generator)[: self.pixels]]
        unlabelled = (~self.task.known(labels)).nonzero()[: self.pixels - len(drawn), 0]
        chosen = torch.cat([drawn, unlabelled])
        return {
            "features": sample["features"].flatten(0, 1)[chosen],
            self.task.kind: labels[chosen],
            "row": sample["row"],
        }


def fit_store(task: Task, config: ProbeConfig) -> Probe:
    """A probe on features as they are stored: one pass over the store, then the exact fit on the pixels drawn.

    Raises:
        StoreError: there is no store.
        ConfigError: it does not have these labels.
        InputError: it holds no sample.
    """
    count = len(FeatureDataset(config.store, [task.kind]))
    if not count:
        raise InputError(f"{config.store} holds no sample to fit on; see its index for the reasons")
    pixels = max(1, min(config.pixels, config.max_vectors // count))
    draw = PixelDraw(task, pixels, config.seed)
    features, targets, groups = [], [], []
    for batch in _batches(config.store, task, config, draw):
        features.append(batch["features"].flatten(0, 1))
        targets.append(task.points(batch[task.kind].flatten()))
        groups.append(batch["row"].repeat_interleave(batch["features"].shape[1]))
    return task.fit(torch.cat(features), torch.cat(targets), torch.cat(groups))


@torch.inference_mode()
def evaluate_store(task: Task, probe: Probe, config: ProbeConfig, store: str) -> dict[str, float]:
    """A probe's numbers over a whole store.

    Raises:
        StoreError: there is no store.
        ConfigError: its features or labels are not what the probe was fitted on.
    """
    channels = stored_layout(store).channels
    weight, bias = probe.channel_map.weight, probe.channel_map.bias
    if channels != weight.shape[1]:
        raise ConfigError(
            f"{store} has features of {channels} channels and the probe takes {weight.shape[1]}; make both stores with "
            "the same backbone and options"
        )
    statistics = [
        task.statistics(task.decide(functional.linear(batch["features"], weight, bias)), task.prepare(batch[task.kind]))
        for batch in _batches(store, task, config, None)
    ]
    if not statistics:
        raise InputError(f"{store} holds no sample to evaluate on; see its index for the reasons")
    found = torch.cat(statistics)
    return {name: measure(found) for name, measure in task.measures.items()}


def train_probe(config: ProbeConfig) -> Probe:
    """Fit a probe on a store, save it, evaluate it on another store if there is one, and print what was found.

    Raises:
        StoreError: there is no store.
        ConfigError: a store does not have what is needed, or the two do not hold the same features.
        GeometryError: less than two images with labels.
    """
    set_threads(config.threads, 1)
    made, setup = stored_config(config.store)
    fill = 65535 if made.seg_dtype == "uint16" else 255
    task: Task = SegmentationTask(config.classes, config.ignore_index, fill) if config.classes else DepthTask()
    if config.val_store:
        _check_same_features(config.store, config.val_store)
    probe = fit_store(task, config)
    backbone = {"name": made.backbone, "layer": setup["layer"], "digest": setup["digests"]["backbone"]}
    data = probe_bytes(probe, backbone=backbone, digests=setup["digests"], seed=config.seed, config=describe(config))
    storage.write_atomic(config.out, data)
    print(f"{config.out}: {describe_probe(probe)}", flush=True)
    if config.val_store:
        numbers = evaluate_store(task, probe, config, config.val_store)
        print(f"{config.val_store}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)
    return probe


def describe_probe(probe: Probe) -> str:
    """What was chosen and from what, in one line."""
    tried = ", ".join(f"{decay:g}: {loss:.4g}" for decay, loss in probe.held_out.items())
    return (
        f"{probe.kind} probe on {probe.vectors} feature vectors, weight decay {probe.weight_decay:g} "
        f"(loss on images left out: {tried})"
    )


def _batches(
    store: str, task: Task, config: ProbeConfig, transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None
) -> Iterator[dict[str, Tensor]]:
    """Features and labels of a whole store, in the order of its rows."""
    dataset = FeatureDataset(store, ["features", task.kind], transform=transform)
    context: Any = "spawn" if config.workers else None
    yield from DataLoader(
        dataset, batch_size=config.batch_size, num_workers=config.workers, multiprocessing_context=context
    )


def _check_same_features(store: str, other: str) -> None:
    """Raise ConfigError where the features of two stores have other channels.

    How they were upsampled may differ: a probe of coarse features on upsampled ones is what *drop-in* means.
    """

    def space(url: str) -> dict[str, Any]:
        config, setup = stored_config(url)
        projection = {"channels": setup["channels"], "pca digest": setup["digests"].get("pca")}
        return feature_space(config, setup) | projection

    differences = list_differences(space(store), space(other), owners=(store, other))
    if differences:
        raise ConfigError(
            f"{store} and {other} do not hold the same features: {'; '.join(differences)}. Make both with the same "
            f"backbone and options, and, as a PCA is fitted to each store, the second with --pca-from {store}"
        )

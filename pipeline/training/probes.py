"""Linear probes at data-set scale: the labels they are fitted on, and probes fitted on and evaluated over a store."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from featup.checkpoints import probe_bytes
from featup.evaluation.probes import Probe
from pipeline.compute.device import set_threads
from pipeline.config.base import describe
from pipeline.config.probe import ProbeConfig
from pipeline.errors import ConfigError, InputError
from pipeline.inputs import storage
from pipeline.loader.dataset import FeatureDataset
from pipeline.store.layout import list_differences, stored_layout
from pipeline.store.provenance import feature_space, stored_config
from pipeline.training.tasks import DepthTask, PixelDraw, SegmentationTask, Task

__all__ = ["evaluate_store", "fit_store", "train_probe"]


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

"""Linear probes at data-set scale: fitted on pixels sampled from one store, evaluated over another."""

from typing import Any

import torch

from featup.checkpoints import probe_bytes
from featup.evaluation.probes import Probe
from pipeline.compute.device import set_threads
from pipeline.config.base import describe
from pipeline.config.probe import ProbeConfig
from pipeline.errors import ConfigError, InputError
from pipeline.inputs import storage
from pipeline.loader.dataset import FeatureDataset
from pipeline.store.layout import list_differences, stored_layout
from pipeline.store.provenance import describe_features, feature_space, stored_config, stored_pca
from pipeline.training.class_names import read_classes
from pipeline.training.pixels import PixelDataset
from pipeline.training.reading import ProbeStatistics, read_batches
from pipeline.training.tasks import DepthTask, SegmentationTask, Task

__all__ = ["describe_probe", "evaluate_store", "fit_store", "train_probe"]


def fit_store(task: Task, config: ProbeConfig) -> Probe:
    """A probe on features as they are stored: one pass over the sampled pixels, then the exact fit.

    Raises:
        StoreError: there is no store.
        ConfigError: it does not have these labels.
        InputError: it holds no sample.
        GeometryError: less than two of the sampled images have labels.
    """
    dataset = PixelDataset(config.store, task, config.pixels, config.max_vectors, config.seed)
    batches = list(read_batches(dataset, config.workers, config.batch_size))
    features = torch.cat([batch["features"] for batch in batches])
    targets = task.points(torch.cat([batch[task.kind] for batch in batches]))
    return task.fit(features, targets, torch.cat([batch["image"] for batch in batches]))


def evaluate_store(task: Task, probe: Probe, config: ProbeConfig, store: str) -> dict[str, float]:
    """A probe's measures over all pixels of a store.

    Raises:
        StoreError: there is no store.
        ConfigError: its features or labels are not what the probe was fitted on.
        InputError: it holds no sample.
    """
    channels, fitted = stored_layout(store).channels, probe.channel_map.weight.shape[1]
    if channels != fitted:
        raise ConfigError(
            f"{store} has features of {channels} channels and the probe takes {fitted}; make both stores with the same "
            "backbone and options"
        )
    transform = ProbeStatistics(task, probe.channel_map)
    dataset = FeatureDataset(store, ["features", task.kind], transform=transform, keys=False)
    if not len(dataset):
        raise InputError(f"{store} holds no sample to evaluate on; see its index for the reasons")
    statistics = torch.cat([batch["statistics"] for batch in read_batches(dataset, config.workers, config.batch_size)])
    return {name: measure(statistics) for name, measure in task.measures.items()}


def train_probe(config: ProbeConfig) -> Probe:
    """Fit a probe on a store, save it, evaluate it on another store if there is one, and print its measures.

    Raises:
        StoreError: there is no store.
        ConfigError: a store does not have what is needed, or the two do not hold the same features.
        GeometryError: less than two images with labels.

    The file holds what :mod:`pipeline.evaluation.predict` needs to apply the probe to other images.
    """
    set_threads(config.threads, 1)
    stored, setup = stored_config(config.store)
    fill = 65535 if stored.seg_dtype == "uint16" else 255
    task: Task = SegmentationTask(config.classes, config.ignore_index, fill) if config.classes else DepthTask()
    if config.val_store:
        _check_same_features(config.store, config.val_store)
    classes = read_classes(config.names, config.classes) if config.names and config.classes else ()
    pca = stored_pca(config.store)[0] if "pca" in setup["digests"] else None
    probe = fit_store(task, config)
    data = probe_bytes(
        probe,
        pca,
        backbone={
            "name": stored.backbone,
            "layer": setup["layer"],
            "norm": stored.norm,
            "digest": setup["digests"]["backbone"],
        },
        digests=setup["digests"],
        features=describe_features(config.store),
        classes=list(classes),
        seed=config.seed,
        config=describe(config),
    )
    storage.write_atomic(config.out, data)
    print(f"{config.out}: {describe_probe(probe)}", flush=True)
    if config.val_store:
        measures = evaluate_store(task, probe, config, config.val_store)
        print(
            f"{config.val_store}: " + "  ".join(f"{name} {value:.4g}" for name, value in measures.items()), flush=True
        )
    return probe


def describe_probe(probe: Probe) -> str:
    """The chosen weight decay and the losses it was chosen by, in one line."""
    tried = ", ".join(f"{decay:g}: {loss:.4g}" for decay, loss in probe.held_out.items())
    return (
        f"{probe.kind} probe on {probe.vectors} feature vectors, weight decay {probe.weight_decay:g} "
        f"(loss on images left out: {tried})"
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

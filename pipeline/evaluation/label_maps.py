"""One label's part of an evaluation: segmentation or depth by linear probes, in up to four settings.

*Drop-in*: one probe is fitted on the coarse features and applied to every method's upsampled features, unchanged.
*Scores*: the class probabilities of that probe are upsampled in place of the features.
*Retrained*: for every method, a probe is fitted on pixels of its own upsampled features.
*448*: for every method, a probe is trained by the field's protocol.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from featup.evaluation.probes import Probe
from featup.upsamplers import ChannelMap
from pipeline.config.evaluate import EvaluateConfig
from pipeline.console import report_time
from pipeline.evaluation.failures import Failures
from pipeline.evaluation.image_set import ImageSet, evenly_spaced, picture_name
from pipeline.evaluation.methods import FeedForwardMethod, Method
from pipeline.evaluation.panels import Panels, colour
from pipeline.evaluation.protocol_448 import Protocol448
from pipeline.evaluation.results import Part, Resampling, compare
from pipeline.progress import CountProgress
from pipeline.training.pixels import PixelSampling
from pipeline.training.probes import describe_probe
from pipeline.training.tasks import Task, sample_indices

__all__ = ["evaluate_labels"]


# Upsampled features with all their channels, at once.
_BATCH_BYTES = 1 << 27


@dataclass(frozen=True, eq=False)
class _Probes:
    """The probes of one setting, and facts of them."""

    maps: Sequence[ChannelMap]
    facts: dict[str, Any]


def evaluate_labels(
    config: EvaluateConfig,
    methods: Sequence[Method],
    baseline: str,
    task: Task,
    train: ImageSet,
    val: ImageSet,
    protocol: Protocol448 | None = None,
) -> Part:
    """Every method's measures of one label.

    Args:
        config: The options.
        methods: What is compared.
        baseline: The name of the method that the others are compared with.
        task: Of the label.
        train, val: Images to fit the probes on, and images to evaluate them on.
        protocol: The field's, to train probes by as well.

    Raises:
        ConfigError: keys that do not fit ``cluster_by``.
        FeatupError: a method that fails on every image.
    """
    resampling = Resampling(config.resamples, config.cluster_by)
    resampling.clusters(val.keys)
    started = time.perf_counter()
    drop_in = _fit_cells(task, train, config)
    report_time(f"{task.kind}: {describe_probe(drop_in)}", started)
    shown = evenly_spaced(len(val), config.pictures)
    pictures: Panels = {
        picture_name(task.kind, val, number): [
            ("image", val.images[number].numpy()),
            ("label", colour(task, val.labels[number], val.labels[number])),
        ]
        for number in shown
    }
    statistics: dict[str, dict[str, list[Tensor]]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    failures = Failures(val)
    total = sum(_upsamplings(config, method, train, val, task, protocol) for method in methods)
    with CountProgress(total, "images") as progress:
        for method in methods:
            count = partial(_count, progress, f"{task.kind}, {method.name}")
            started = time.perf_counter()
            probes = {"drop-in": _Probes([drop_in.channel_map], _describe([drop_in]))}
            if config.retrained and not method.per_image:
                fits = _fit_pixels(task, method, train, config, count)
                probes["retrained"] = _Probes([fit.channel_map for fit in fits], _describe(fits))
            if protocol is not None and not method.per_image:
                probes["448"] = _train_448(protocol, method, config, count)
            ready = time.perf_counter()
            statistics[method.name], predictions = _predict(task, method, val, probes, shown, config, failures, count)
            numbers[method.name] = {
                "seconds_per_image": (time.perf_counter() - ready) / len(val),
                **{name: setting.facts for name, setting in probes.items()},
            }
            if _has_scores(method, task):
                statistics[method.name]["scores"] = [
                    _filter_scores(task, method, val, drop_in.channel_map, config, failures, count)
                ]
                numbers[method.name]["scores"] = {}
            numbers[method.name]["seconds"] = time.perf_counter() - started
            for panels, number, prediction in zip(pictures.values(), shown, predictions, strict=True):
                panels.append((method.name, colour(task, prediction, val.labels[number])))
            measure = next(iter(task.measures))
            report_time(
                f"{task.kind}, {method.name}: {measure} "
                + ", ".join(
                    f"{name} {task.measures[measure](each[0]):.4g}" for name, each in statistics[method.name].items()
                ),
                started,
            )
    kept = failures.kept(range(len(val)))
    pairs = {}
    for setting in ("drop-in", "scores", "retrained", "448"):
        of_setting = {
            name: [probe[kept] for probe in settings[setting]]
            for name, settings in statistics.items()
            if setting in settings
        }
        if of_setting:
            keys = [val.keys[number] for number in kept]
            comparison = compare(task.measures, of_setting, baseline, resampling, keys)
            pairs[setting] = comparison.pairs
            for name, compared in comparison.methods.items():
                numbers[name][setting] |= compared
    data = {f"{task.kind} train": train.facts, f"{task.kind} val": val.facts | {"left out": failures.reasons}}
    return Part(task.kind, numbers, data, pairs, pictures, describe_probe(drop_in))


def _count(progress: CountProgress, remark: str, images: int) -> None:
    progress.reach(progress.done + images, remark)


def _upsamplings(
    config: EvaluateConfig, method: Method, train: ImageSet, val: ImageSet, task: Task, protocol: Protocol448 | None
) -> int:
    """How many images a method upsamples, for the progress."""
    count = len(val) * (2 if _has_scores(method, task) else 1)
    if not method.per_image:
        count += len(train) if config.retrained else 0
        count += config.seeds * protocol.upsamplings if protocol else 0
    return count


def _has_scores(method: Method, task: Task) -> TypeGuard[FeedForwardMethod]:
    """Whether class scores can be filtered. Depth is linear in the features, and filtering it changes nothing."""
    return task.kind == "seg" and isinstance(method, FeedForwardMethod) and method.filters_scores


def _describe(probes: Sequence[Probe]) -> dict[str, Any]:
    return {
        "weight_decays": [probe.weight_decay for probe in probes],
        "vectors": [probe.vectors for probe in probes],
    }


def _train_448(protocol: Protocol448, method: Method, config: EvaluateConfig, count: Callable[[int], None]) -> _Probes:
    """A probe for each seed."""
    started = time.perf_counter()
    maps = [protocol.train(method, seed, lambda images, loss: count(images)) for seed in range(config.seeds)]
    epochs = config.seeds * protocol.recipe.epochs
    return _Probes(maps, {"seconds_per_epoch": (time.perf_counter() - started) / epochs, **asdict(protocol.recipe)})


def _fit_cells(task: Task, train: ImageSet, config: EvaluateConfig) -> Probe:
    """The probe of coarse features."""
    grid = (train.features.shape[1], train.features.shape[2])
    targets = torch.cat([task.cells(train.labels[batch], grid) for batch in train.batches(config.batch_size)])
    groups = torch.arange(len(train)).repeat_interleave(grid[0] * grid[1])
    sampled = sample_indices(len(groups), config.max_vectors, 0)
    return task.fit(train.features.flatten(0, 2)[sampled], targets.flatten(0, 2)[sampled], groups[sampled])


@torch.inference_mode()
def _fit_pixels(
    task: Task, method: Method, train: ImageSet, config: EvaluateConfig, count: Callable[[int], None]
) -> list[Probe]:
    """Probes on pixels of a method's upsampled features, one for each seed; all methods are given the same pixels."""
    samplings = [PixelSampling(len(train), config.pixels, config.max_vectors, seed) for seed in range(config.seeds)]
    counts = [sampling.counts() for sampling in samplings]
    features: list[list[Tensor]] = [[] for _ in samplings]
    labels: list[list[Tensor]] = [[] for _ in samplings]
    groups: list[list[Tensor]] = [[] for _ in samplings]
    images = torch.tensor(sorted(set().union(*counts)))
    map_bytes = 4 * train.size[0] * train.size[1] * train.features.shape[-1]
    for batch in torch.split(images, max(1, min(config.batch_size, _BATCH_BYTES // map_bytes))):
        for image, upsampled in zip(batch.tolist(), train.upsample(method, batch, None), strict=True):
            known = task.known(train.labels[image])
            for seed, sampling in enumerate(samplings):
                chosen = sampling.choose(image, counts[seed].get(image, 0), known)
                features[seed].append(upsampled.flatten(0, 1)[chosen.to(upsampled.device)].float().cpu())
                labels[seed].append(train.labels[image].flatten()[chosen])
                groups[seed].append(torch.full((len(chosen),), image))
        count(len(batch))
    # With few vectors not every image is sampled.
    count(len(train) - len(images))
    # Autograd, which the fit uses, takes no tensors made in inference mode.
    with torch.inference_mode(False):
        return [
            task.fit(torch.cat(vectors).clone(), task.points(torch.cat(values).clone()), torch.cat(numbers).clone())
            for vectors, values, numbers in zip(features, labels, groups, strict=True)
        ]


@torch.inference_mode()
def _predict(
    task: Task,
    method: Method,
    val: ImageSet,
    probes: Mapping[str, _Probes],
    shown: Sequence[int],
    config: EvaluateConfig,
    failures: Failures,
    count: Callable[[int], None],
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Statistics of every probe, all applied at once; and drop-in predictions of the images to show, ``[H, W]``."""
    maps = [channel_map for setting in probes.values() for channel_map in setting.maps]
    stacked = ChannelMap(
        torch.cat([channel_map.weight.cpu() for channel_map in maps]),
        torch.cat([channel_map.bias.cpu() for channel_map in maps]),
    )
    statistics: list[list[Tensor]] = [[] for _ in maps]
    predictions: list[Tensor] = []
    for batch in val.batches(config.batch_size):
        outputs = failures.attempt(
            method.name, lambda images: val.upsample(method, images, stacked), batch, (*val.size, len(stacked.bias))
        ).cpu()
        for number, output in enumerate(torch.split(outputs, task.channels, -1)):
            prediction = task.decide(output)
            statistics[number].append(task.statistics(prediction, val.labels[batch]))
            if number == 0:
                predictions += [prediction[image - batch.start] for image in shown if batch.start <= image < batch.stop]
        count(batch.stop - batch.start)
    joined = iter([torch.cat(batches) for batches in statistics])
    return {setting: [next(joined) for _ in fits.maps] for setting, fits in probes.items()}, predictions


@torch.inference_mode()
def _filter_scores(
    task: Task,
    method: FeedForwardMethod,
    val: ImageSet,
    probe: ChannelMap,
    config: EvaluateConfig,
    failures: Failures,
    count: Callable[[int], None],
) -> Tensor:
    """Statistics of the most probable class after the coarse features' class probabilities are upsampled."""
    statistics = []
    for batch in val.batches(config.batch_size):
        probabilities = failures.attempt(
            method.name, lambda images: val.filter_scores(method, images, probe), batch, (*val.size, task.channels)
        ).cpu()
        statistics.append(task.statistics(task.decide(probabilities), val.labels[batch]))
        count(batch.stop - batch.start)
    return torch.cat(statistics)

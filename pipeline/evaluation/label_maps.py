"""One label's part of an evaluation: segmentation or depth by linear probes, drop-in and retrained.

*Drop-in*: one probe is fitted on the coarse features and applied to every method's upsampled features, unchanged.
*Retrained*: for every method, a probe is fitted on pixels of its own upsampled features.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featup.evaluation.probes import Probe
from featup.upsamplers import ChannelMap
from pipeline.config.evaluate import EvaluateConfig
from pipeline.console import report_time
from pipeline.evaluation.image_set import ImageSet, evenly_spaced, picture_name
from pipeline.evaluation.methods import Method
from pipeline.evaluation.panels import Panels, colour
from pipeline.evaluation.results import Part, compare
from pipeline.training.pixels import PixelSampling
from pipeline.training.probes import describe_probe
from pipeline.training.tasks import Task, sample_indices

__all__ = ["evaluate_labels"]


# Upsampled features with all their channels, at once.
_BATCH_BYTES = 1 << 27


def evaluate_labels(
    config: EvaluateConfig, methods: Sequence[Method], baseline: str, task: Task, train: ImageSet, val: ImageSet
) -> Part:
    """Every method's measures of one label.

    Args:
        config: The options.
        methods: What is compared.
        baseline: The name of the method that the others are compared with.
        task: Of the label.
        train, val: Images to fit the probes on, and images to evaluate them on.
    """
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
    for method in methods:
        started = time.perf_counter()
        probes = {"drop-in": [drop_in]}
        if config.retrained and not method.per_image:
            probes["retrained"] = _fit_pixels(task, method, train, config)
        ready = time.perf_counter()
        statistics[method.name], predictions = _predict(task, method, val, probes, shown, config)
        for panels, number, prediction in zip(pictures.values(), shown, predictions, strict=True):
            panels.append((method.name, colour(task, prediction, val.labels[number])))
        numbers[method.name] = {
            "seconds_per_image": (time.perf_counter() - ready) / len(val),
            "seconds": time.perf_counter() - started,
            **{name: _describe(fits) for name, fits in probes.items()},
        }
        measure = next(iter(task.measures))
        report_time(
            f"{task.kind}, {method.name}: {measure} "
            + ", ".join(
                f"{name} {task.measures[measure](each[0]):.4g}" for name, each in statistics[method.name].items()
            ),
            started,
        )
    for name, settings in statistics.items():
        for setting, each in settings.items():
            numbers[name][setting] |= compare(task.measures, each, statistics[baseline][setting], config.resamples)
    data = {f"{task.kind} train": train.facts, f"{task.kind} val": val.facts}
    return Part(task.kind, numbers, data, pictures, describe_probe(drop_in))


def _describe(probes: Sequence[Probe]) -> dict[str, Any]:
    return {
        "weight_decays": [probe.weight_decay for probe in probes],
        "vectors": [probe.vectors for probe in probes],
    }


def _fit_cells(task: Task, train: ImageSet, config: EvaluateConfig) -> Probe:
    """The probe of coarse features."""
    grid = (train.features.shape[1], train.features.shape[2])
    targets = torch.cat([task.cells(train.labels[batch], grid) for batch in train.batches(config.batch_size)])
    groups = torch.arange(len(train)).repeat_interleave(grid[0] * grid[1])
    sampled = sample_indices(len(groups), config.max_vectors, 0)
    return task.fit(train.features.flatten(0, 2)[sampled], targets.flatten(0, 2)[sampled], groups[sampled])


@torch.inference_mode()
def _fit_pixels(task: Task, method: Method, train: ImageSet, config: EvaluateConfig) -> list[Probe]:
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
    probes: Mapping[str, Sequence[Probe]],
    shown: Sequence[int],
    config: EvaluateConfig,
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Statistics of every probe, all applied at once; and drop-in predictions of the images to show, ``[H, W]``."""
    maps = [probe.channel_map for fits in probes.values() for probe in fits]
    stacked = ChannelMap(
        torch.cat([channel_map.weight for channel_map in maps]), torch.cat([channel_map.bias for channel_map in maps])
    )
    statistics: list[list[Tensor]] = [[] for _ in maps]
    predictions: list[Tensor] = []
    for batch in val.batches(config.batch_size):
        outputs = val.upsample(method, batch, stacked).cpu()
        for number, output in enumerate(torch.split(outputs, task.channels, -1)):
            prediction = task.decide(output)
            statistics[number].append(task.statistics(prediction, val.labels[batch]))
            if number == 0:
                predictions += [prediction[image - batch.start] for image in shown if batch.start <= image < batch.stop]
    joined = iter([torch.cat(batches) for batches in statistics])
    return {setting: [next(joined) for _ in fits] for setting, fits in probes.items()}, predictions

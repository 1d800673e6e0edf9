"""The part of class activation maps: how faithful the upsampled maps are to the backbone's own classifier."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.evaluation.cam import class_probabilities, explain, grad_cam
from featup.evaluation.metrics import average_drop, average_increase
from featup.upsamplers import ChannelMap
from pipeline.compute.device import device_of
from pipeline.config.evaluate import EvaluateConfig
from pipeline.console import report_time
from pipeline.evaluation.failures import Failures
from pipeline.evaluation.image_set import ImageSet, evenly_spaced, picture_name
from pipeline.evaluation.methods import Method
from pipeline.evaluation.panels import Panels
from pipeline.evaluation.results import Measures, Part, Resampling, compare
from pipeline.progress import CountProgress

__all__ = ["evaluate_activation_maps"]


_MEASURES: Measures = {
    "AD": lambda scores: average_drop(scores[:, 0], scores[:, 1]),
    "AI": lambda scores: average_increase(scores[:, 0], scores[:, 1]),
}


def evaluate_activation_maps(
    config: EvaluateConfig, backbone: Backbone, methods: Sequence[Method], baseline: str, images: ImageSet
) -> Part:
    """Average drop and increase of every method, for the class that the backbone's classifier predicts.

    Args:
        config, backbone, methods: The options, the backbone with its classifier, and what is compared.
        baseline: The name of the method that the others are compared with.
        images: The images, without labels.
    """
    started = time.perf_counter()
    probabilities, classes, weights = _classify(config, backbone, images)
    report_time(f"CAM: {len(images)} images through the classifier", started)
    shown = {number: picture_name("cam", images, number) for number in evenly_spaced(len(images), config.pictures)}
    pictures: Panels = {
        name: [(f"image, {probabilities[number]:.3f}", images.images[number].numpy())] for number, name in shown.items()
    }
    statistics: dict[str, list[Tensor]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    failures = Failures(images)
    with CountProgress(len(methods) * len(images), "images") as progress:
        for method in methods:
            started = time.perf_counter()
            seconds = 0.0
            scores = []
            for batch in images.batches(config.batch_size):
                before = time.perf_counter()
                with torch.inference_mode():
                    maps = [
                        failures.attempt(
                            method.name,
                            partial(_activations, images, method, weights[number]),
                            slice(number, number + 1),
                            images.size,
                        )
                        for number in range(batch.start, batch.stop)
                    ]
                seconds += time.perf_counter() - before
                masked = explain(images.images[batch].to(maps[0].device), torch.cat(maps))
                predicted = classes[batch].to(masked.device)
                scores.append(class_probabilities(backbone, masked).gather(1, predicted[:, None])[:, 0].cpu())
                for number in shown.keys() & set(range(batch.start, batch.stop)):
                    title = f"{method.name}, {scores[-1][number - batch.start]:.3f}"
                    pictures[shown[number]].append((title, masked[number - batch.start].cpu().numpy()))
                progress.reach(progress.done + batch.stop - batch.start, f"CAM, {method.name}")
            statistics[method.name] = [torch.stack([probabilities, torch.cat(scores)], 1)]
            numbers[method.name] = {
                "seconds_per_image": seconds / len(images),
                "seconds": time.perf_counter() - started,
            }
            report_time(f"CAM, {method.name}: AD {_MEASURES['AD'](statistics[method.name][0]):.4g}", started)
    kept = failures.kept(range(len(images)))
    comparison = compare(
        _MEASURES,
        {name: [probe[kept] for probe in probes] for name, probes in statistics.items()},
        baseline,
        Resampling(config.resamples),
        [images.keys[number] for number in kept],
    )
    for name, compared in comparison.methods.items():
        numbers[name] |= compared
    facts = {**images.facts, "classes": classes.tolist(), "left out": failures.reasons}
    return Part("CAM", numbers, {"CAM": facts}, {"": comparison.pairs}, pictures)


def _activations(images: ImageSet, method: Method, weights: ChannelMap, batch: slice) -> Tensor:
    """Activation maps of some of the images, ``[B, H, W]``."""
    return images.upsample(method, batch, weights)[..., 0]


def _classify(config: EvaluateConfig, backbone: Backbone, images: ImageSet) -> tuple[Tensor, Tensor, list[ChannelMap]]:
    """Each image's predicted class: its probability ``[N]``, its number ``[N]``, and its map's weights."""
    probabilities, classes, weights = [], [], []
    for batch in images.batches(config.batch_size):
        pixels = images.images[batch].to(device_of(backbone))
        highest, predicted = class_probabilities(backbone, pixels).max(1)
        probabilities.append(highest.cpu())
        classes.append(predicted.cpu())
        weights += grad_cam(backbone, pixels, predicted)
    return torch.cat(probabilities), torch.cat(classes), weights

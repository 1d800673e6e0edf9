"""The views' part of an evaluation: the explained variance (R^2) of the backbone's features of shifted views."""

import time
from collections.abc import Sequence

import torch

from featup.backbones import Backbone
from featup.multiview.back_projection import view_consistency
from featup.multiview.views import Jitter, warp
from featup.training.objective import seeded
from pipeline.compute.device import device_of
from pipeline.config.evaluate import EvaluateConfig
from pipeline.console import report_time
from pipeline.evaluation.image_set import ImageSet, evenly_spaced
from pipeline.evaluation.methods import Method
from pipeline.evaluation.results import Measures, Part, compare

__all__ = ["evaluate_views"]


_MEASURE = "explained variance"
_MEASURES: Measures = {_MEASURE: lambda scores: 100 * float(scores.mean())}
_JITTER = Jitter(max_pad=20, zoom=(1.0, 1.0))
# The purpose of the generator of views; purposes below 200 belong to training.
_VIEWS = 200


@torch.inference_mode()
def evaluate_views(
    config: EvaluateConfig, backbone: Backbone, methods: Sequence[Method], baseline: str, val: ImageSet, name: str
) -> Part:
    """The explained variance of views' features, for images spread over the set.

    A token of a view is predicted by the mean over its patch: nothing there is learned, and all methods are treated
    alike.

    Args:
        config, backbone, methods: The options, the backbone of the features, and what is compared.
        baseline: The name of the method that the others are compared with.
        val: The images.
        name: Of the part.
    """
    images = evenly_spaced(len(val), config.views_images)
    scores: dict[str, list[float]] = {method.name: [] for method in methods}
    seconds = dict.fromkeys(scores, 0.0)
    for number in images:
        image = slice(number, number + 1)
        views = _JITTER.sample(config.views, val.size, seeded(_VIEWS, number))
        normalised = backbone.normalise(val.images[image].to(device_of(backbone))).permute(0, 2, 3, 1)
        warped = warp(normalised.expand(len(views), -1, -1, -1), views, _JITTER.max_pad)
        targets = backbone.features(warped.permute(0, 3, 1, 2)).float()
        for method in methods:
            started = time.perf_counter()
            maps = val.upsample(method, image, None)[0]
            seconds[method.name] += time.perf_counter() - started
            scores[method.name].append(float(view_consistency(maps, views, targets, _JITTER)))
    statistics = {title: torch.tensor(values) for title, values in scores.items()}
    numbers = {}
    for title, ours in statistics.items():
        started = time.perf_counter()
        compared = compare(_MEASURES, [ours], [statistics[baseline]], config.resamples)
        numbers[title] = {"seconds_per_image": seconds[title] / len(images), **compared}
        report_time(f"{name}, {title}: {_MEASURE} {compared['measures'][_MEASURE]:.4g} %", started)
    return Part(name, numbers, {name: {"images": len(images), "views": config.views}})

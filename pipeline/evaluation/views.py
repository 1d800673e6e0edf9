"""The views' part of an evaluation: the explained variance (R^2) of the backbone's features of shifted views."""

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.evaluation.noise_ceiling import noise_ceiling
from featup.multiview.back_projection import view_consistency
from featup.multiview.views import Jitter, View, warp
from featup.training.objective import seeded
from pipeline.compute.device import device_of
from pipeline.config.evaluate import EvaluateConfig
from pipeline.evaluation.failures import Failures
from pipeline.evaluation.image_set import ImageSet, evenly_spaced
from pipeline.evaluation.methods import Method
from pipeline.evaluation.results import Measures, Part, Resampling, compare
from pipeline.progress import CountProgress

__all__ = ["evaluate_views"]


_MEASURE = "explained variance"
_MEASURES: Measures = {_MEASURE: lambda scores: 100 * float(scores.mean())}
_JITTER = Jitter(max_pad=20, zoom=(1.0, 1.0))
# The purposes of the generators of views and of their partners; purposes below 200 belong to training.
_VIEWS, _PARTNER_VIEWS = 200, 201
# Of each view, for the ceiling.
_PARTNERS = 4


@torch.inference_mode()
def evaluate_views(
    config: EvaluateConfig, backbone: Backbone, methods: Sequence[Method], baseline: str, val: ImageSet, name: str
) -> Part:
    """The explained variance of views' features, for images spread over the set, and its ceiling.

    A token of a view is predicted by the mean over its patch: nothing there is learned, and all methods are treated
    alike. The ceiling is the mean over the images of :func:`featup.evaluation.noise_ceiling.noise_ceiling`.

    Args:
        config, backbone, methods: The options, the backbone of the features, and what is compared.
        baseline: The name of the method that the others are compared with.
        val: The images.
        name: Of the part.

    Raises:
        ConfigError: keys that do not fit ``cluster_by``.
        FeatupError: no image that every method serves.
    """
    images = evenly_spaced(len(val), config.views_images)
    resampling = Resampling(config.resamples, config.cluster_by)
    resampling.clusters([val.keys[number] for number in images])
    scores: dict[str, list[float]] = {method.name: [] for method in methods}
    seconds = dict.fromkeys(scores, 0.0)
    ceilings = []
    failures = Failures(val)
    with CountProgress(len(images) * len(methods), "images") as progress:
        for number in images:
            image = slice(number, number + 1)
            normalised = backbone.normalise(val.images[image].to(device_of(backbone))).permute(0, 2, 3, 1)

            def features(views: Sequence[View], normalised: Tensor = normalised) -> Tensor:
                warped = warp(normalised.expand(len(views), -1, -1, -1), views, _JITTER.max_pad)
                return backbone.features(warped.permute(0, 3, 1, 2)).float()

            views = _JITTER.sample(config.views, val.size, seeded(_VIEWS, number))
            targets = features(views)
            partners = seeded(_PARTNER_VIEWS, number)
            ceilings.append(noise_ceiling(features, views, targets, _JITTER, backbone.stride, _PARTNERS, partners))
            for method in methods:
                started = time.perf_counter()
                maps = failures.attempt(
                    method.name,
                    partial(val.upsample, method, projection=None),
                    image,
                    (*val.size, val.features.shape[-1]),
                )
                seconds[method.name] += time.perf_counter() - started
                scores[method.name].append(float(view_consistency(maps[0], views, targets, _JITTER)))
                progress.reach(progress.done + 1, f"{name}, {method.name}")
    kept = failures.kept(images)
    comparison = compare(
        _MEASURES,
        {title: [torch.tensor(values)[kept]] for title, values in scores.items()},
        baseline,
        resampling,
        [val.keys[images[place]] for place in kept],
    )
    numbers = {
        title: {"seconds_per_image": seconds[title] / len(images), **compared}
        for title, compared in comparison.methods.items()
    }
    for title, compared in numbers.items():
        print(f"{name}, {title}: {_MEASURE} {compared['measures'][_MEASURE]:.4g} %", flush=True)
    ceiling = 100 * sum(ceilings[place] for place in kept) / len(kept)
    facts = {"images": len(images), "views": config.views, "ceiling": ceiling, "left out": failures.reasons}
    note = (
        f"{name}: no map can explain more than {ceiling:.1f} % of this variance. The rest is noise: how the backbone's "
        "features of the same pixels differ between views that are moved by whole strides or mirrored."
    )
    return Part(name, numbers, {name: facts}, {"": comparison.pairs}, notes=[note])

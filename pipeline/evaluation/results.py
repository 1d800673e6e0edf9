"""The results of an evaluation's parts, and their measures with the differences between the methods."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featup.evaluation.metrics import bootstrap, difference_interval
from pipeline.errors import ConfigError
from pipeline.evaluation.panels import Panels

__all__ = ["Comparison", "Measures", "Part", "Resampling", "compare"]


# Functions from statistics, image by image, to a number; the methods are compared by the first one.
Measures = Mapping[str, Callable[[Tensor], float]]
# Method, other method, and the difference between them.
Pairs = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, eq=False)
class Part:
    """The results of one part: a label, its views, or class activation maps.

    ``methods``: each method's numbers, as :func:`compare` has them, with seconds; ``data``: facts of the image sets, by
    name; ``pairs``: of each setting, ``""`` where there is only one; ``pictures``: panels of each picture, by file
    name; ``probe``: the drop-in probe in one line; ``notes``: lines for the legend.
    """

    name: str
    methods: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Mapping[str, Any]]
    pairs: Mapping[str, Pairs]
    pictures: Panels = field(default_factory=dict)
    probe: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Resampling:
    """How images are resampled for intervals.

    Attributes:
        resamples: Bootstraps of the images.
        cluster_by: An expression whose first group, found in an image's key, names its cluster; clusters are resampled
            as a whole. ``None``: every image by itself.
    """

    resamples: int
    cluster_by: str | None = None

    def clusters(self, keys: Sequence[str]) -> Tensor | None:
        """The cluster of each image, int64 ``[N]``, numbered in the order of their names.

        Raises:
            ConfigError: a key without a cluster, or fewer than two clusters.
        """
        if self.cluster_by is None:
            return None
        found = [re.search(self.cluster_by, key) for key in keys]
        names = [match[1] if match else None for match in found]
        lacking = [key for key, name in zip(keys, names, strict=True) if name is None]
        if lacking:
            raise ConfigError(
                f"cluster_by={self.cluster_by!r} finds no cluster in {len(lacking)} of {len(keys)} keys, such as "
                f"{lacking[0]!r}; its first group must match in every key"
            )
        numbers = {name: number for number, name in enumerate(sorted({name for name in names if name is not None}))}
        if len(numbers) < 2:
            raise ConfigError(
                f"cluster_by={self.cluster_by!r} puts all {len(keys)} images into the one cluster "
                f"{next(iter(numbers))!r}, and one cluster has no interval; resample shorter pieces of it, such as "
                "frames whose numbers begin alike, with an expression that also takes the number's first digits"
            )
        return torch.tensor([numbers[name] for name in names if name is not None])


@dataclass(frozen=True)
class Comparison:
    """The numbers of the methods, and of each pair of them.

    Attributes:
        methods: ``measures``: means over the probes; ``spread``: standard deviations, where there are several probes;
            ``difference``: of the first measure and the first probes to the baseline, empty for the baseline itself.
        pairs: ``pairs[a][b]`` is how much more than ``b`` the method ``a`` has of the first measure, by the first
            probes: ``observed``, with ``mean``, ``low`` and ``high`` over the resamples.
    """

    methods: dict[str, dict[str, Any]]
    pairs: Pairs


def compare(
    measures: Measures,
    statistics: Mapping[str, Sequence[Tensor]],
    baseline: str,
    resampling: Resampling,
    keys: Sequence[str],
) -> Comparison:
    """The measures of all methods, and the differences of the first measure between any two.

    Args:
        measures: Functions from statistics to numbers.
        statistics: By the method's name, of each of its probes, ``[N, ...]``; of the same images for all methods.
        baseline: The method that differences are also given to beside the measures, where it is among them.
        resampling: Of the images, for the intervals of differences; the same resamples for all methods.
        keys: Of the images, ``[N]``.

    Raises:
        ConfigError: see :meth:`Resampling.clusters`.
    """
    first, measure = next(iter(measures.items()))
    clusters = resampling.clusters(keys)
    observed = {name: measure(probes[0]) for name, probes in statistics.items()}
    resampled = {
        name: bootstrap(measure, probes[0], resampling.resamples, clusters) for name, probes in statistics.items()
    }
    pairs = {
        name: {
            other: {
                "observed": observed[name] - observed[other],
                **asdict(difference_interval(resampled[name], resampled[other])),
            }
            for other in statistics
            if other != name
        }
        for name in statistics
    }
    methods: dict[str, dict[str, Any]] = {}
    for method, probes in statistics.items():
        values = {name: [measure(probe) for probe in probes] for name, measure in measures.items()}
        methods[method] = {
            "measures": {name: float(np.mean(value)) for name, value in values.items()},
            "difference": {first: pairs[method][baseline]} if baseline in pairs[method] else {},
        }
        if len(probes) > 1:
            methods[method]["spread"] = {name: float(np.std(value, ddof=1)) for name, value in values.items()}
    return Comparison(methods, pairs)

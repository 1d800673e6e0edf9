"""The results of an evaluation's parts, and their measures with the difference to the baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from featup.evaluation.metrics import bootstrap_difference
from pipeline.evaluation.panels import Panels

__all__ = ["Measures", "Part", "compare"]


# Functions from statistics, image by image, to a number; the first one is compared with the baseline.
Measures = Mapping[str, Callable[[Tensor], float]]


@dataclass(frozen=True, eq=False)
class Part:
    """The results of one part: a label, its views, or class activation maps.

    ``methods``: each method's numbers, as :func:`compare` has them, with seconds; ``data``: facts of the image sets, by
    name; ``pictures``: panels of each picture, by file name; ``probe``: the drop-in probe in one line.
    """

    name: str
    methods: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Mapping[str, Any]]
    pictures: Panels = field(default_factory=dict)
    probe: str = ""


def compare(
    measures: Measures, statistics: Sequence[Tensor], baseline: Sequence[Tensor], resamples: int
) -> dict[str, Any]:
    """The measures of a method, and how far the first measure differs from the baseline's.

    Args:
        measures: Functions from statistics to numbers.
        statistics: Of each probe of the method, ``[N, ...]``.
        baseline: Those of the baseline.
        resamples: Bootstraps of the images, for the interval of the difference.

    Returns:
        ``measures``: means over the probes; ``spread``: standard deviations, where there are several probes;
        ``difference``: of the first probes, empty for the baseline itself.
    """
    values = {name: [measure(probe) for probe in statistics] for name, measure in measures.items()}
    numbers: dict[str, Any] = {
        "measures": {name: float(np.mean(value)) for name, value in values.items()},
        "difference": {},
    }
    if len(statistics) > 1:
        numbers["spread"] = {name: float(np.std(value, ddof=1)) for name, value in values.items()}
    if statistics[0] is not baseline[0]:
        name, measure = next(iter(measures.items()))
        interval = bootstrap_difference(measure, statistics[0], baseline[0], resamples)
        observed = measure(statistics[0]) - measure(baseline[0])
        numbers["difference"][name] = {"observed": observed, **asdict(interval)}
    return numbers

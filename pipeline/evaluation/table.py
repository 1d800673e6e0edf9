"""The numbers of an evaluation, and its table as Markdown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from featup.evaluation.metrics import bootstrap_difference
from pipeline.config.evaluate import EvaluateConfig
from pipeline.training.tasks import Task

__all__ = ["table"]


_UNITS = {name: ("%", "↑") for name in ("explained", "mIoU", "accuracy", "delta 1.25", "AI")} | {
    "RMSE": ("m", "↓"),
    "AD": ("%", "↓"),
}
_INTERVAL = ("observed", "low", "high")


def table(found: Mapping[str, Any]) -> str:
    """The table of what :func:`evaluate` found, in Markdown, with columns that also line up as plain text."""
    # Images of later parts may have been seen before, by rows that keep what they made of them.
    timed = next(iter(next(iter(found["rows"].values()))))
    last = f"{timed} ms/image"
    columns = {"upsampler": None}
    cells: list[dict[str, str]] = []
    for row, parts in found["rows"].items():
        cells.append({"upsampler": row, last: f"{1000 * parts[timed]['seconds_per_image']:.0f}"})
        for part, setting, numbers in _parts(parts):
            for name, value in numbers["measures"].items():
                unit, better = _UNITS[name]
                title = " ".join(word for word in (part, setting, name, unit, better) if word)
                columns[title] = None
                places = 3 if unit == "m" else 1
                cells[-1][title] = f"{value:.{places}f}"
                if name in numbers.get("spread", {}):
                    cells[-1][title] += f" ± {numbers['spread'][name]:.{places}f}"
                if name in numbers["difference"]:
                    observed, low, high = (f"{numbers['difference'][name][key]:+.{places}f}" for key in _INTERVAL)
                    cells[-1][title] += f" ({observed} [{low}, {high}])"
    columns[last] = None
    widths = {name: max(len(name), *(len(one.get(name, "")) for one in cells)) for name in columns}
    config = found["config"]
    notes = []
    if found["probes"]:
        notes.append("- Drop-in: the probe of the coarse features, unchanged.")
    if found["probes"] and config["retrained"]:
        several = "; mean ± standard deviation over the probes, differences of the first" if config["seeds"] > 1 else ""
        notes.append(
            f"- Retrained: {config['seeds']} probe{'s'[: config['seeds'] > 1]} for every row, on up to "
            f"{config['pixels']} pixels of every training image's upsampled features{several}."
        )
    lines = [
        f"# {config['backbone']}, images of {config['size']}, features normalised by {config['norm']}",
        "",
        "| " + " | ".join(f"{name:{width}}" for name, width in widths.items()) + " |",
        "| " + " | ".join("-" * (width - 1) + ("-", ":")[name != "upsampler"] for name, width in widths.items()) + " |",
        *("| " + " | ".join(f"{one.get(name, ''):{width}}" for name, width in widths.items()) + " |" for one in cells),
        "",
        f"- ↑ more is better, ↓ less is better. In brackets: difference to {found['baseline']}, and its 95% interval "
        f"over {config['resamples']} bootstraps of the images.",
        *notes,
        f"- {last}: upsampling with all probes applied at once, and counting; without fitting probes.",
        *(f"- {text}" for text in found["probes"].values()),
        *(f"- {name}: {data['images']} images" for name, data in found["data"].items()),
    ]
    return "\n".join(lines) + "\n"


def _parts(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for part, numbers in parts.items():
        if "measures" in numbers:
            yield part, "", numbers
        for setting in ("drop-in", "retrained"):
            if setting in numbers:
                yield part, setting, numbers[setting]


def summarise(
    measures: Mapping[str, Callable[[Tensor], float]],
    ours: Sequence[Tensor],
    baseline: Sequence[Tensor],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Means over probes, their spread where there are several, and the difference to the baseline's first probe."""
    values = {name: [measure(one) for one in ours] for name, measure in measures.items()}
    compared = next(iter(measures))
    numbers: dict[str, Any] = {
        "measures": {name: float(np.mean(one)) for name, one in values.items()},
        "difference": {},
    }
    if len(ours) > 1:
        numbers["spread"] = {name: float(np.std(one, ddof=1)) for name, one in values.items()}
    if ours[0] is not baseline[0]:
        interval = bootstrap_difference(measures[compared], ours[0], baseline[0], config.resamples)
        observed = measures[compared](ours[0]) - measures[compared](baseline[0])
        numbers["difference"][compared] = {"observed": observed, **asdict(interval)}
    return numbers


def plain_task(task: Task) -> Any:
    """The NumPy type that torch has for a label."""
    return np.int32 if task.kind == "seg" else np.float32

"""The table of an evaluation as Markdown, with columns that also line up as plain text."""

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["table"]


_UNITS = {name: ("%", "↑") for name in ("explained variance", "mIoU", "accuracy", "delta 1.25", "AI")} | {
    "RMSE": ("m", "↓"),
    "AD": ("%", "↓"),
}
_INTERVAL = ("observed", "low", "high")


def table(results: Mapping[str, Any]) -> str:
    """The table of what :func:`pipeline.evaluation.evaluate.evaluate` returns, a line for each method."""
    # The first part alone times every method alike: a fit to an image is kept, and later parts find it.
    timed = next(iter(next(iter(results["methods"].values()))))
    last = f"{timed} ms/image"
    cells = [
        {"upsampler": method, **_cells(parts), last: f"{1000 * parts[timed]['seconds_per_image']:.0f}"}
        for method, parts in results["methods"].items()
    ]
    columns = dict.fromkeys(name for line in cells for name in line if name != last) | {last: None}
    widths = {name: max(len(name), *(len(line.get(name, "")) for line in cells)) for name in columns}
    config = results["config"]
    lines = [
        f"# {config['backbone']}, images of {config['size']}, features normalised by {config['norm']}",
        "",
        "| " + " | ".join(f"{name:{width}}" for name, width in widths.items()) + " |",
        "| " + " | ".join("-" * (width - 1) + ("-", ":")[name != "upsampler"] for name, width in widths.items()) + " |",
        *(
            "| " + " | ".join(f"{line.get(name, ''):{width}}" for name, width in widths.items()) + " |"
            for line in cells
        ),
        "",
        f"- ↑ more is better, ↓ less is better. In brackets: difference to {results['baseline']}, and its 95% interval "
        f"over {config['resamples']} bootstraps of the images.",
        *_resampling_notes(config),
        *_probe_notes(results),
        f"- {last}: upsampling with all probes applied at once, and counting; without fitting probes.",
        *(f"- {text}" for text in results["probes"].values()),
        *(f"- {text}" for text in results["notes"]),
        *(f"- {name}: {data['images']} images{_left_out(data)}" for name, data in results["data"].items()),
    ]
    if config["pairs"]:
        lines += _pair_tables(results)
    return "\n".join(lines) + "\n"


def _left_out(data: Mapping[str, Any]) -> str:
    reasons = data.get("left out", ())
    if not reasons:
        return ""
    return f", {len(reasons)} of them left out for all methods because one failed: {'; '.join(reasons[:5])}"


def _resampling_notes(config: Mapping[str, Any]) -> Iterator[str]:
    if config["cluster_by"] is not None:
        yield f"- Images of one sequence, by {config['cluster_by']!r} in their keys, are resampled together."


def _pair_tables(results: Mapping[str, Any]) -> Iterator[str]:
    """For each column that methods are compared by, a table of the differences between any two."""
    for part, settings in results["pairs"].items():
        for setting, pairs in settings.items():
            names = list(pairs)
            numbers = results["methods"][names[0]][part]
            numbers = numbers[setting] if setting else numbers
            unit, _ = _UNITS[next(iter(numbers["measures"]))]
            places = 3 if unit == "m" else 1
            yield from (
                "",
                f"## {' '.join(word for word in (part, setting, next(iter(numbers['measures'])), unit) if word)}: the "
                "line's upsampler less the column's",
                "",
                "| " + " | ".join(["", *names[:-1]]) + " |",
                "| --- |" + " ---: |" * (len(names) - 1),
            )
            for line, name in enumerate(names[1:], 1):
                cells = (_difference(pairs[name][other], places) for other in names[:line])
                yield "| " + " | ".join([name, *cells, *[""] * (len(names) - 1 - line)]) + " |"


def _difference(difference: Mapping[str, float], places: int) -> str:
    observed, low, high = (f"{difference[key]:+.{places}f}" for key in _INTERVAL)
    return f"{observed} [{low}, {high}]"


def _probe_notes(results: Mapping[str, Any]) -> Iterator[str]:
    config = results["config"]
    if results["probes"]:
        yield "- Drop-in: the probe of the coarse features, unchanged."
    if results["probes"] and config["retrained"]:
        several = "; mean ± standard deviation over the probes, differences of the first" if config["seeds"] > 1 else ""
        yield (
            f"- Retrained: {config['seeds']} probe{'s'[: config['seeds'] > 1]} for every method, on up to "
            f"{config['pixels']} pixels of every training image's upsampled features{several}."
        )
    yield from _setting_notes(results)


def _setting_notes(results: Mapping[str, Any]) -> Iterator[str]:
    """Of the settings that only some tables have."""
    cells = [numbers for parts in results["methods"].values() for numbers in parts.values()]
    if any("scores" in numbers for numbers in cells):
        yield (
            "- Scores: the drop-in probe's class probabilities at low resolution, upsampled in place of the features; "
            "for upsamplers that are one linear operator over space. (Logits would give the features' figures.)"
        )
    if any("448" in numbers for numbers in cells):
        config = results["config"]
        # What the recipe was is of the first method that has it; it is the same for all.
        recipe = next(numbers["448"] for numbers in cells if "448" in numbers)
        yield (
            f"- 448: the field's protocol at {config['size']}: for every method one 1x1 convolution with bias, trained "
            f"by AdamW ({recipe['learning_rate']:g}, cosine over all steps) for {recipe['epochs']} epochs of batches "
            f"of {recipe['batch_size']} centre crops, mirrored at random, on all labelled pixels; macro IoU over all "
            "pixels of the validation set. The probe is moved through the upsampler: the same figures for less work."
        )


def _cells(parts: Mapping[str, Any]) -> dict[str, str]:
    """A method's cells, by the titles of their columns."""
    cells = {}
    for part, setting, numbers in _settings(parts):
        for name, value in numbers["measures"].items():
            unit, better = _UNITS[name]
            places = 3 if unit == "m" else 1
            text = f"{value:.{places}f}"
            if name in numbers.get("spread", {}):
                text += f" ± {numbers['spread'][name]:.{places}f}"
            if name in numbers["difference"]:
                text += f" ({_difference(numbers['difference'][name], places)})"
            cells[" ".join(word for word in (part, setting, name, unit, better) if word)] = text
    return cells


def _settings(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for part, numbers in parts.items():
        if "measures" in numbers:
            yield part, "", numbers
        for setting in ("drop-in", "scores", "retrained", "448"):
            if setting in numbers:
                yield part, setting, numbers[setting]

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
        *_probe_notes(results),
        f"- {last}: upsampling with all probes applied at once, and counting; without fitting probes.",
        *(f"- {text}" for text in results["probes"].values()),
        *(f"- {name}: {data['images']} images" for name, data in results["data"].items()),
    ]
    return "\n".join(lines) + "\n"


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
                observed, low, high = (f"{numbers['difference'][name][key]:+.{places}f}" for key in _INTERVAL)
                text += f" ({observed} [{low}, {high}])"
            cells[" ".join(word for word in (part, setting, name, unit, better) if word)] = text
    return cells


def _settings(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for part, numbers in parts.items():
        if "measures" in numbers:
            yield part, "", numbers
        for setting in ("drop-in", "retrained"):
            if setting in numbers:
                yield part, setting, numbers[setting]

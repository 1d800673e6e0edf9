"""The log of a training run, and its picture."""

import io
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.config.train import TrainConfig
from pipeline.errors import StoreError
from pipeline.inputs import storage

__all__ = ["plot_log", "read_log", "recorded_steps", "warn_of_bilinear", "write_log"]


def write_log(out: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write ``OUT/log.jsonl`` whole: object stores cannot append, and a reader never reads half a line."""
    storage.write_atomic(_place(out), "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_log(out: str, step: int) -> list[dict[str, Any]]:
    """Read the lines of ``OUT/log.jsonl`` up to a step, from step 0 on.

    Raises:
        StoreError: lines are missing: the log is older than the checkpoint, or was changed.
    """
    lines = [line for line in _lines(out) if line["step"] <= step]
    if [line["step"] for line in lines] != list(range(step + 1)):
        raise StoreError(
            f"{_place(out)} does not hold a line for each of the steps 0 to {step} that the last checkpoint has behind "
            "it: it was changed or removed; put it back, or start anew in another --out"
        )
    return lines


def recorded_steps(out: str) -> int:
    """The last step in ``OUT/log.jsonl``, which is written with each checkpoint; 0 where there is no log."""
    lines = _lines(out)
    return int(lines[-1]["step"]) if lines else 0


def _lines(out: str) -> list[dict[str, Any]]:
    place = _place(out)
    return [json.loads(line) for line in storage.read_bytes(place).splitlines()] if storage.exists(place) else []


def _place(out: str) -> str:
    return storage.join(out, "log.jsonl")


def warn_of_bilinear(config: TrainConfig, lines: Sequence[Mapping[str, Any]], best: float) -> str:
    """What to do where a run's last weights predict held-out images worse than bilinear interpolation; else empty.

    Args:
        config: Of the run.
        lines: Of its whole log, from step 0 on.
        best: The held-out loss of the best weights.
    """
    bilinear, last = lines[0]["bilinear"]["held_out_loss"], lines[-1]["held_out_loss"]
    if last <= bilinear:
        return ""
    text = (
        "warning: the last weights predict held-out images worse than bilinear interpolation "
        f"(held-out loss {last:.4f}, bilinear {bilinear:.4f})"
    )
    if best <= bilinear:
        return f"{text}; that of the best ones is {best:.4f}: use best.safetensors"
    return (
        f"{text}, and so do the best ones ({best:.4f}). Do not use them: train again in another --out with more "
        f"--steps than {config.steps}, or use --upsampler bilateral, which needs no training"
    )


def plot_log(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The loss and the held-out loss over the steps, as a PNG.

    Args:
        lines: Of the log, from step 0 on.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in lines[1:]]
    losses = np.array([line["loss"] for line in lines[1:]])
    left.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    ends = np.linspace(0, len(losses), min(len(losses), 50) + 1).astype(int)
    parts = [slice(start, stop) for start, stop in pairwise(ends)]
    means = [(np.mean(steps[part]), losses[part].mean()) for part in parts]
    left.plot(*zip(*means, strict=True), label="means")
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    scores = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    right.plot(*zip(*scores, strict=True), marker=".", label="trained")
    right.axhline(lines[0]["bilinear"]["held_out_loss"], color="0.5", linestyle="--", label="bilinear")
    right.set(xlabel="step", ylabel="held-out loss")
    right.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()

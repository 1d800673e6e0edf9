"""The log of a training run, its picture, and lines of progress."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.train import TrainConfig
from pipeline.errors import StoreError
from pipeline.training.log import plot_log, read_log, recorded_steps, warn_of_bilinear, write_log
from pipeline.training.progress import StepProgress

LINES = [
    {"step": 0, "held_out_loss": 0.9, "bilinear": {"held_out_loss": 0.75}},
    {"step": 1, "loss": 2.0, "seconds": 0.5},
    {"step": 2, "loss": 1.5, "held_out_loss": 0.5, "seconds": 0.5},
    {"step": 3, "loss": 1.25, "seconds": 0.5},
]


def test_the_log_is_cut_at_a_step(tmp_path: Path) -> None:
    write_log(str(tmp_path), LINES)
    assert read_log(str(tmp_path), 3) == LINES
    assert read_log(str(tmp_path), 2) == LINES[:3]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 4
    assert recorded_steps(str(tmp_path)) == 3
    assert recorded_steps(str(tmp_path / "none")) == 0


def test_a_log_with_a_hole_is_refused(tmp_path: Path) -> None:
    for lines, step in (([], 0), (LINES, 4), (LINES[1:], 3), ([*LINES[:2], LINES[3]], 3)):
        write_log(str(tmp_path), lines)
        with pytest.raises(StoreError, match=rf"log\.jsonl does not hold a line for each of the steps 0 to {step}"):
            read_log(str(tmp_path), step)
    with pytest.raises(StoreError, match="put it back"):
        read_log(str(tmp_path / "none"), 1)


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_the_picture_of_the_log(steps: int) -> None:
    more = [{"step": step, "loss": 1 / step} for step in range(4, steps + 1)]
    picture = np.asarray(Image.open(io.BytesIO(plot_log([*LINES, *more][: steps + 1]))).convert("L"))
    assert min(picture.shape) > 300
    for half in np.array_split(picture, 2, axis=1):
        assert half.std() > 10, "nothing is drawn"


def test_progress_says_step_loss_pace_and_what_is_left() -> None:
    times = iter([0.0, 1.0, 5.0, 8.0, 10.0])
    stream = io.StringIO()
    progress = StepProgress(10, 14, stream, every=4, clock=lambda: next(times))
    for step, loss in ((11, 1.0), (12, 0.123456), (13, 3.0), (14, 0.5)):
        progress.add(step, loss)
    assert stream.getvalue().splitlines() == [
        "step 12/14  loss 0.1235  0.40 steps/s  5 s gone, 5 s left",
        "step 14/14  loss 0.5  0.40 steps/s  10 s gone, 0 s left",
    ]


@pytest.mark.parametrize(
    ("options", "last", "best", "texts"),
    [
        ({}, 0.75, 0.75, []),
        ({}, 0.7, 0.5, []),
        ({}, 0.8, 0.5, ["(held-out loss 0.8000, bilinear 0.7500)", "is 0.5000: use best.safetensors"]),
        ({}, 0.8, 0.76, ["so do the best ones (0.7600)", "more --steps than 400", "--upsampler bilateral"]),
        ({"preset": "paper"}, 2.0, 0.8, ["(held-out loss 2.0000,", "more --steps than 2000"]),
    ],
    ids=str,
)
def test_a_training_that_ends_worse_than_bilinear_says_what_to_do(
    options: dict[str, Any], last: float, best: float, texts: list[str]
) -> None:
    config = TrainConfig(shards=("a.tar",), out="out", **options)
    text = warn_of_bilinear(config, [LINES[0], {"step": 1, "held_out_loss": last}], best)
    assert bool(text) == bool(texts)
    assert "\n" not in text
    assert all(part in text for part in texts), text

"""Training without Ray: the order of the samples, images ahead of time, the log; the options."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.base import describe, read_config
from pipeline.config.parser import parse_args
from pipeline.config.train import TrainConfig
from pipeline.decode.options import DecodeOptions
from pipeline.errors import ConfigError, InputError, StoreError
from pipeline.inputs.plan import Plan, make_plan
from pipeline.options import Size
from pipeline.training.log import plot_log, read_log, write_log
from pipeline.training.loop import learning_rate
from pipeline.training.order import SampleOrder, load_draw, step_batches
from pipeline.training.progress import StepProgress
from tests.e2e import support

OPTIONS = DecodeOptions(size=Size(16, 24))


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"shards": ("a.tar",), "out": "out", **options})


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Samples 0 to 4 and 5 to 8 in two tars; 3, 5 and 6 are not images. Sample n is grey, of the value 20 n."""
    folder = tmp_path_factory.mktemp("shards")
    for tar, numbers in enumerate((range(5), range(5, 9))):
        members = []
        for number in numbers:
            grey = support.encode(np.full((20, 30, 3), 20 * number, np.uint8), "PNG")
            members.append((f"s{number}.png", b"no image" if number in (3, 5, 6) else grey))
        support.write_tar(folder / f"{tar}.tar", members)
    index = str(folder / "index")
    return Plan(make_plan([str(folder / "{0..1}.tar")], index), 1, index)


@pytest.mark.parametrize(("samples", "holdout"), [(2, 1), (9, 2), (10, 3), (101, 17), (1000, 999)])
def test_an_epoch_is_every_sample_that_is_not_held_out(samples: int, holdout: int) -> None:
    order = SampleOrder(samples, holdout, seed=3)
    held_out = order.held_out()
    assert len(set(held_out)) == holdout
    assert held_out == sorted(held_out)
    assert max(np.diff([0, *held_out, samples])) <= 2 * (samples / holdout + 1), "not spread"
    for epoch in (0, 1, 5):
        drawn = [next(order.drawn(epoch * len(order) + place)) for place in range(len(order))]
        assert sorted([*drawn, *held_out]) == list(range(samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        order = SampleOrder(40, 4, seed)
        return [next(order.drawn(number * 36 + place)) for place in range(36)]

    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(epoch(number, seed)) for number in (0, 1, 2) for seed in (0, 1)}) == 6


def test_stand_ins_are_the_next_of_the_epoch() -> None:
    order = SampleOrder(9, 2, seed=3)
    epoch = [next(order.drawn(7 + place)) for place in range(7)]
    assert list(order.drawn(7 + 5)) == [*epoch[5:], *epoch[:5]]


def test_something_must_be_left_to_train_on() -> None:
    with pytest.raises(InputError, match="32 samples with holdout=32: nothing is left to train on; give more shards"):
        SampleOrder(32, 32, 0)


def test_the_next_sample_stands_in_for_one_that_fails(plan: Plan) -> None:
    draw = load_draw(plan, [5, 3, 8, 0], OPTIONS)
    assert draw.image.shape == (16, 24, 3)
    assert (draw.image == 160).all()
    assert list(draw.failures) == [5, 3]
    assert re.match(r"s5 of .*1\.tar: (undecodable|unsupported_format)", draw.failures[5])
    assert load_draw(plan, [2], OPTIONS).failures == {}
    with pytest.raises(InputError, match=r"not one of 3 samples can be decoded: s6 of .*1\.tar: .*; s3 of .*0\.tar"):
        load_draw(plan, [6, 3, 5], OPTIONS)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_share_the_same_batches(plan: Plan, workers: int) -> None:
    order = SampleOrder(9, 2, seed=1)
    batch, steps = 4, 5

    def expected(step: int, place: int) -> int:
        good = (number for number in order.drawn((step - 1) * batch + place) if number not in (3, 5, 6))
        return 20 * next(good)

    each = batch // workers
    found = np.concatenate(
        [
            [
                [int(draw.image[0, 0, 0]) for draw in draws]
                for draws in step_batches(
                    plan, order, OPTIONS, batch, range(rank * each, (rank + 1) * each), range(1, steps + 1), 2
                )
            ]
            for rank in range(workers)
        ],
        1,
    )
    assert found.tolist() == [[expected(step, place) for place in range(batch)] for step in range(1, steps + 1)]


def test_a_run_that_goes_on_sees_what_it_would_have_seen(plan: Plan) -> None:
    order = SampleOrder(9, 2, seed=1)

    def seen(first: int) -> list[list[int]]:
        batches = step_batches(plan, order, OPTIONS, 3, range(3), range(first, 12), 3)
        return [[int(draw.image[0, 0, 0]) for draw in draws] for draws in batches]

    assert seen(8) == seen(1)[7:]


def test_batches_may_be_left_before_their_end(plan: Plan) -> None:
    batches = step_batches(plan, SampleOrder(9, 2, 1), OPTIONS, 2, range(2), range(1, 1000), 2)
    assert len(next(batches)) == 2
    batches.close()  # type: ignore[attr-defined]


def test_learning_rates() -> None:
    assert {learning_rate(config(lr=0.1), step) for step in (1, 7, 2000)} == {0.1}
    cosine = config(lr=0.1, schedule="cosine", steps=10)
    rates = [learning_rate(cosine, step) for step in range(1, 11)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[5] == pytest.approx(0.05)
    assert 0 < rates[-1] < 0.01


LINES = [
    {"step": 0, "explained_variance": 0.1, "bilinear": 0.25},
    {"step": 1, "loss": 2.0, "seconds": 0.5},
    {"step": 2, "loss": 1.5, "explained_variance": 0.5, "seconds": 0.5},
    {"step": 3, "loss": 1.25, "seconds": 0.5},
]


def test_the_log_is_cut_at_a_step(tmp_path: Path) -> None:
    write_log(str(tmp_path), LINES)
    assert read_log(str(tmp_path), 3) == LINES
    assert read_log(str(tmp_path), 2) == LINES[:3]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 4


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
    ("options", "text"),
    [
        ({"size": Size(0, 5)}, "size=0x5 must be between 1 and 16384 on both sides"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"jitters": 0}, "jitters=0 must be at least 1"),
        ({"holdout": 0}, "holdout=0 must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every=0 must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"worker_attempts": 0}, "worker_attempts=0 must be at least 1"),
        ({"projections": 0}, "projections=0 must be at least 1"),
        ({"max_pad": -1}, "max_pad=-1 must be between 0 and 16384"),
        ({"max_zoom": 0.9}, "max_zoom=0.9 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be more than 0"),
        ({"lr": float("nan")}, "lr=nan must be more than 0"),
        ({"seed": -1}, "seed=-1 must be between 0 and 4294967295"),
        ({"crf": -1.0}, "crf=-1.0 must be at least 0"),
        ({"workers": 2, "batch_size": 3}, "batch_size=3 is that of all 2 workers and must divide among them"),
        ({"tensorboard": True, "out": "s3://b/c"}, "tensorboard with out='s3://b/c': event files are written to local"),
        ({"limit": 0}, "limit=0 must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        config(**options)


def test_options_are_read_and_written_like_those_of_precompute() -> None:
    argv = ["--shards", "a.tar", "--out", "o", "--size", "32x48", "--projections", "null", "--upsampler", "sapa"]
    found, _ = parse_args(TrainConfig, [*argv, "--batch-size", "4", "--jitters", "2"], description="")
    assert (found.size, found.projections, found.upsampler) == (Size(32, 48), None, "sapa")
    assert (found.batch_size, found.jitters) == (4, 2)
    assert read_config(TrainConfig, describe(found)) == found


def test_what_does_not_change_the_result_may_change_in_a_run_that_goes_on() -> None:
    changes = {"workers": 2, "checkpoint_every": 7, "gpus_per_worker": 1.0, "cpus_per_worker": 2.0, "threads": 3}
    changes |= {"worker_attempts": 5, "tensorboard": True, "object_store_mb": 99, "max_failed_fraction": 0.5}
    assert config(**changes).identity() == config().identity()
    for name, value in {"steps": 3, "batch_size": 4, "lr": 0.5, "seed": 1, "holdout": 3, "upsampler": "ifa"}.items():
        assert config(**{name: value}).identity() != config().identity(), name

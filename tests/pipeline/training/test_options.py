"""Options of training that are refused, and those that may change in a run that goes on."""

import os
import re
from typing import Any

import pytest

from pipeline.config.base import describe, read_config
from pipeline.config.parser import parse_args
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError
from pipeline.options import Size
from pipeline.training.loop import learning_rate


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"shards": ("a.tar",), "out": "out", **options})


def test_learning_rates() -> None:
    assert {learning_rate(config(lr=0.1), step) for step in (1, 7, 2000)} == {0.1}
    cosine = config(lr=0.1, schedule="cosine", steps=10)
    rates = [learning_rate(cosine, step) for step in range(1, 11)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[5] == pytest.approx(0.05)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": Size(0, 5)}, "size=0x5 must be between 1 and 16384 on both sides"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"jitters": 0}, "jitters=0 must be at least 1"),
        ({"holdout": 0}, "holdout=0 must be more than 0"),
        ({"holdout": 1.5}, "holdout=1.5 must be a share below 1, or a whole number of samples"),
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
        ({"stages": 0}, "stages=0 must be between 1 and 8"),
        ({"width": 0}, "width=0 must be between 1 and 1024"),
        ({"preset": "slow"}, "preset='slow' must be one of fast, paper"),
        ({"objective": "words"}, "objective='words' must be one of views, crops"),
        ({"least_crop": 1.0}, "least_crop=1.0 must be between 0.05 and 0.95"),
        ({"crop_detail": 0}, "crop_detail=0 must be between 1 and 8"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be more than 0"),
        (
            {"also_backbones": ("resnet50",), "objective": "crops"},
            "also_backbones=('resnet50',) with upsampler=jbu and objective=crops: only anyup takes features of several",
        ),
        ({"workers": 2, "batch_size": 3}, "batch_size=3 is that of all 2 workers and must divide among them"),
        ({"tensorboard": True, "out": "s3://b/c"}, "tensorboard with out='s3://b/c': event files are written to local"),
        ({"limit": 0}, "limit=0 must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        config(**options)


def test_options_win_over_the_preset_and_what_was_resolved_is_recorded() -> None:
    fast = config()
    assert (fast.preset, fast.jitters, fast.batch_size, fast.steps) == ("fast", 2, 2, 400)
    argv = ["--shards", "a.tar", "--out", "o", "--steps", "50", "--preset", "paper", "--batch-size", "2"]
    paper, _ = parse_args(TrainConfig, argv, description="")
    assert (paper.jitters, paper.batch_size, paper.steps) == (5, 2, 50)
    official = config(preset="paper")
    assert (official.jitters, official.batch_size, official.steps) == (5, 4, 2000)
    assert (official.lr, official.optimiser, official.max_pad, official.max_zoom) == (1e-3, "nadam", 20, 2.0)
    assert (official.projections, official.crf, official.uncertainty) == (30, 0.001, True)
    assert (official.clip_steps, official.clip_norm, official.downsampler) == (10, 1e-4, "attention")
    recorded = describe(paper)
    assert (recorded["preset"], recorded["jitters"], recorded["steps"]) == ("paper", 5, 50)
    assert read_config(TrainConfig, recorded) == paper


def test_weights_of_other_backbones_are_found_from_another_folder() -> None:
    crops: dict[str, Any] = {"upsampler": "anyup", "objective": "crops"}
    found = config(also_backbones=("resnet50", "vit_tiny=w/v.pth", "a.b=s3://w/x.pth"), **crops).also_backbones
    assert found == ("resnet50", f"vit_tiny={os.getcwd()}/w/v.pth", "a.b=s3://w/x.pth")


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

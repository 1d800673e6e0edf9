"""The training loop in one process, by a session of its own: neither Ray nor other workers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from featup.checkpoints import check_backbone, load_upsampler
from featup.upsamplers import create_upsampler
from pipeline.compute.prepare import plan_input
from pipeline.config.train import TrainConfig
from pipeline.errors import StoreError
from pipeline.inputs.plan import Plan
from pipeline.options import Size
from pipeline.training.create import create_objective, make_backbones
from pipeline.training.log import read_log
from pipeline.training.loop import TrainingWorker
from tests.e2e import support
from tests.pipeline.training.support import InterruptedRunError, LocalSession, train

ROOT = Path(__file__).resolve().parents[3]


def config(out: Path, shards: Path) -> TrainConfig:
    options: dict[str, Any] = {"backbone": "test_vit", "pretrained": False, "stride": 16, "size": Size(32, 48)}
    options |= {"steps": 6, "batch_size": 2, "jitters": 2, "holdout": 2, "lr": 0.001, "crf": 0.0, "threads": 1}
    return TrainConfig(shards=(str(shards),), out=str(out), evaluate_every=3, checkpoint_every=2, **options)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight samples, of which the fourth is no image."""
    samples = [support.good_sample(f"s{number}", number) for number in range(8)]
    samples[3] = [("s3.jpg", b"no image")]
    members = [member for sample in samples for member in sample]
    return support.write_tar(tmp_path_factory.mktemp("shards") / "train.tar", members)


def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(shards: Path, tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole", shards))
    assert [metrics["step"] for metrics in whole.metrics] == [2, 4, 6]
    assert whole.metrics[-1]["failed_samples"] == 1
    # Six samples to an epoch, two epochs: the one that is no image came twice, and was replaced.
    assert whole.metrics[-1]["replaced"] == 2
    assert whole.metrics[-1]["failures"][0].startswith("s3 of ")
    with pytest.raises(InterruptedRunError):
        train(config(tmp_path / "stopped", shards), last_step=4)
    resumed = train(config(tmp_path / "stopped", shards))
    assert [metrics["step"] for metrics in resumed.metrics] == [6]
    assert (whole.steps, resumed.steps) == ([1, 2, 3, 4, 5, 6], [5, 6])
    logs = [read_log(str(tmp_path / name), 6) for name in ("whole", "stopped")]
    for line in (*logs[0], *logs[1]):
        line.pop("seconds", None)
    assert logs[0] == logs[1]
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.metrics[-1] == whole.metrics[-1]
    worse = [line.get("worse_than_bilinear") for line in logs[0]]
    assert worse == [None] * 6 + [logs[0][6]["held_out_loss"] > logs[0][0]["bilinear"]["held_out_loss"]]


def description_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["featup"]))


def test_the_best_weights_are_those_of_least_held_out_loss(shards: Path, tmp_path: Path) -> None:
    """A rate that is far too high ruins what the first steps reached."""
    ruined = replace(config(tmp_path, shards), steps=8, evaluate_every=1, lr=3.0)
    train(ruined)
    losses = {line["step"]: line["held_out_loss"] for line in read_log(str(tmp_path), 8)[1:]}
    best = min(losses, key=losses.__getitem__)
    assert best != 8
    log = description_of(tmp_path / "best.safetensors")["provenance"]["log"]
    assert (log["step"], log["held_out_loss"]) == (best, losses[best])
    assert description_of(tmp_path / "last.safetensors")["provenance"]["log"]["step"] == 8


def test_the_gradients_of_the_first_steps_are_clipped(shards: Path, tmp_path: Path) -> None:
    """Of steps of AdamW alike the second moments are those of the clipped gradients."""
    options = replace(config(tmp_path / "clipped", shards), steps=2, clip_steps=2, clip_norm=1e-4)
    train(options)
    state = torch.load(tmp_path / "clipped" / "checkpoint" / "state.pt", weights_only=True)
    second = sum(moments["exp_avg_sq"].sum().item() for moments in state["optimiser"]["state"].values())
    # (1 - 0.999) g^2, and 0.999 of it once more.
    assert second <= 2 * 0.001 * 1e-8 * 1.01
    train(replace(options, clip_steps=0, out=str(tmp_path / "free")))
    state = torch.load(tmp_path / "free" / "checkpoint" / "state.pt", weights_only=True)
    assert sum(moments["exp_avg_sq"].sum().item() for moments in state["optimiser"]["state"].values()) > 1e-6


def test_as_many_stages_as_stride_and_size_ask_for(shards: Path, tmp_path: Path) -> None:
    """Stride 32 takes five; a stack of four served no such map at the image's size."""
    coarse = replace(
        config(tmp_path, shards), backbone="mobilenetv3_small_050", stride=32, size=Size(64, 96), steps=1, jitters=1
    )
    train(coarse)
    jbu = load_upsampler(tmp_path / "last.safetensors", "jbu")
    assert len(jbu.stages) == 5  # type: ignore[arg-type]
    (backbone,) = make_backbones(coarse)
    assert create_objective(replace(coarse, stages=6), backbone).upsampler.largest((2, 3)) == (128, 192)


def test_anyup_by_crops_on_two_backbones(shards: Path, tmp_path: Path) -> None:
    """Each has its channels and stride; a checkpoint serves both, and goes on after a stop like any other."""
    mixed = replace(
        config(tmp_path / "whole", shards),
        upsampler="anyup",
        objective="crops",
        width=8,
        also_backbones=("mobilenetv3_small_050",),
        size=Size(64, 96),
        steps=4,
    )
    train(mixed)
    stopped = replace(mixed, out=str(tmp_path / "stopped"))
    with pytest.raises(InterruptedRunError):
        train(stopped, last_step=2)
    train(stopped)
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = read_log(str(tmp_path / "whole"), 4)
    assert {"reconstruction", "cosine"} <= lines[1].keys()
    assert lines[0]["bilinear"]["held_out_loss"] > 0
    backbones = make_backbones(mixed)
    assert [backbone.stride for backbone in backbones] == [(16, 16), (32, 32)]
    for backbone in backbones:
        path = tmp_path / "whole" / "last.safetensors"
        check_backbone(path, backbone)
        anyup = create_upsampler("anyup", channels=backbone.channels, checkpoint=path)
        images = torch.zeros(1, 64, 96, 3, dtype=torch.uint8)
        assert anyup(backbone(images), images, (64, 96)).shape == (1, 64, 96, backbone.channels)


def test_other_weights_than_the_runs_are_refused(shards: Path, tmp_path: Path) -> None:
    options = config(tmp_path, shards)
    plan = Plan(plan_input(options), 1, str(tmp_path / "plan" / "index"))
    with pytest.raises(StoreError, match=r"worker 0 has a test_vit with weights .*; give every node the same weight"):
        TrainingWorker(options, plan, {"backbones": [{"digest": "0" * 64}]}, LocalSession(tmp_path / "none", 0))


def test_training_imports_no_ray() -> None:
    code = (
        "import sys, pkgutil, importlib, pipeline.training as package\n"
        "for module in pkgutil.iter_modules(package.__path__, 'pipeline.training.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)

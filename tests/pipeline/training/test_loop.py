"""The training loop in one process, by a session of its own: neither Ray nor other workers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.compute.prepare import plan_input
from pipeline.config.train import TrainConfig
from pipeline.errors import StoreError
from pipeline.inputs.plan import Plan
from pipeline.options import Size
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
    assert worse == [None] * 6 + [logs[0][6]["explained_variance"] < logs[0][0]["bilinear"]]


def test_other_weights_than_the_runs_are_refused(shards: Path, tmp_path: Path) -> None:
    options = config(tmp_path, shards)
    plan = Plan(plan_input(options), 1, str(tmp_path / "plan" / "index"))
    with pytest.raises(StoreError, match=r"worker 0 has a test_vit with weights .*; give every node the same weight"):
        TrainingWorker(options, plan, {"backbone": {"digest": "0" * 64}}, LocalSession(tmp_path / "none", 0))


def test_training_imports_no_ray() -> None:
    code = (
        "import sys, pkgutil, importlib, pipeline.training as package\n"
        "for module in pkgutil.iter_modules(package.__path__, 'pipeline.training.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)

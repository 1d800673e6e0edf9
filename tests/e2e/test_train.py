"""Training as a user runs it: whole, stopped, killed and run again, by several workers, and its checkpoint in use.

The jobs share one Ray, all but those that are stopped or killed with their own.
"""

import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml
from safetensors import safe_open
from tensorboardX.proto.event_pb2 import Event

from featup.checkpoints import load_upsampler
from pipeline.config.base import read_config
from pipeline.config.parser import parse_args
from pipeline.config.train import TrainConfig
from pipeline.store.lease import Lease
from tests.e2e import support
from tests.e2e.in_process import run
from tests.pipeline.training.support import train

BACKBONE = ("--backbone", "test_vit", "--pretrained", "false", "--stride", 16, "--size", "32x48")
# Enough of them that a run is killed in their midst.
STEPS = 24
OPTIONS = (*BACKBONE, "--object-store-mb", 100, "--steps", STEPS, "--batch-size", 2, "--jitters", 2, "--holdout", 3)
OPTIONS = (*OPTIONS, "--crf", 0)
OPTIONS = (*OPTIONS, "--evaluate-every", 7, "--checkpoint-every", 3, "--max-failed-fraction", 0.5)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """The first job starts it, with its own settings, as it does in a process of its own, and the others find it."""
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 samples; the sixth is no image."""
    folder = tmp_path_factory.mktemp("shards")
    for tar, count in enumerate((7, 6)):
        samples = [support.good_sample(f"img{tar}{n:02d}", 10 * tar + n) for n in range(count)]
        if tar == 0:
            samples[5] = [("img005.jpg", b"no image")]
        support.write_tar(folder / f"train-{tar:04d}.tar", [member for sample in samples for member in sample])
    return folder / "train-{0000..0001}.tar"


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run("train", "--shards", shards, "--out", out, *OPTIONS, "--tensorboard", "true")


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def same_result(out: Path, expected: Path) -> None:
    assert untimed(log(out)) == untimed(log(expected))
    for name in ("last.safetensors", "best.safetensors"):
        found, wanted = tensors(out / name), tensors(expected / name)
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == [], name


@pytest.mark.ray
def test_what_a_run_leaves(whole: tuple[Path, str]) -> None:
    out, text = whole
    assert "10 samples to train on and 3 held out; jbu for test_vit, 2x3 to 32x48, 64 channels; by views, " in text
    assert f"preset fast: {STEPS} steps of 2 images" in text
    lines = log(out)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 7, 14, 21, STEPS]
    assert all(line["loss"] == line["reconstruction"] and line["seconds"] > 0 for line in lines[1:])
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    best = min(list(losses)[1:], key=losses.__getitem__)
    bilinear = lines[0]["bilinear"]["held_out_loss"]
    summary = (
        f"held-out loss: {losses[best]:.4f} at step {best}, {losses[STEPS]:.4f} at the end, {losses[0]:.4f} before"
    )
    assert f"{summary} training, {bilinear:.4f} by bilinear" in text
    config = read_config(TrainConfig, yaml.safe_load((out / "config.yaml").read_text()))
    assert (config.steps, config.jitters, config.out) == (STEPS, 2, str(out))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name, step in (("last", STEPS), ("best", best)):
        with safe_open(out / f"{name}.safetensors", framework="pt") as file:
            description = json.loads(file.metadata()["featup"])
        provenance = description["provenance"]
        assert (description["kind"], description["channels"]) == ("jbu", 64)
        assert provenance["log"]["step"] == step
        assert provenance["log"]["held_out_loss"] == losses[step]
        assert provenance["identity"]["input samples"] == 13
        assert provenance["identity"]["backbone digests"] == [provenance["backbone"]["digest"]]
        assert provenance["versions"]["torch"] == torch.__version__
    assert not load_upsampler(out / "last.safetensors", "jbu").training


@pytest.mark.ray
def test_every_sampled_image_is_accounted_for(whole: tuple[Path, str]) -> None:
    """48 images of 10 samples, one of which is no image and comes once in an epoch."""
    text = whole[1]
    summary = text.split("sampled ")[1].split(", by the next")[0]
    sampled, used, replaced = (int(word) for word in summary.split() if word.isdigit())
    assert (sampled, replaced) in ((48, 4), (48, 5))
    assert sampled == used + replaced
    assert "input 13 = train 10 + held out 3" in text
    assert "1 samples cannot be decoded" in text
    assert "img005 of" in text


@pytest.mark.ray
def test_event_files_hold_the_log(whole: tuple[Path, str]) -> None:
    out = whole[0]
    (path,) = (out / "tensorboard").iterdir()
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 16 + size
    losses = [value for _, tag, value in sorted(found) if tag == "loss"]
    assert losses == pytest.approx([line["loss"] for line in log(out)[1:]])
    assert {step for step, tag, _ in found if tag == "held_out_loss"} == {7, 14, 21, STEPS}


@pytest.mark.ray
def test_the_same_command_goes_on_after_the_death_of_the_driver(
    shards: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    """Killed, moreover, while Ray Train wrote its list of checkpoints: half of it is there."""
    out = tmp_path / "out"
    command = ("--shards", shards, "--out", out, *OPTIONS)
    job = support.start("train", *command, log=tmp_path / "log")
    support.wait_for(lambda: (out / "plan" / "snapshot.json").exists() or job.poll() is not None, "two checkpoints")
    # All at once, as by a power cut: left alone, Ray's workers go on until they notice.
    tree = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait(timeout=60)
    psutil.wait_procs(tree, timeout=60)
    before = log(out)
    assert 6 <= len(before) - 1 < STEPS, (tmp_path / "log").read_text()[-3000:]
    snapshot = out / "checkpoints" / "checkpoint_manager_snapshot.json"
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    text = run("train", *command, says="going on after step")
    step = int(text.split("going on after step ")[1].split(",")[0])
    assert 3 <= step < STEPS
    same_result(out, whole[0])
    assert log(out)[: step + 1] == before[: step + 1], "steps were done again, by their seconds"


@pytest.mark.ray
def test_the_job_survives_the_death_of_a_worker(shards: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def kill() -> None:
        support.wait_for(lambda: list(out.glob("checkpoints/*.json")), "a checkpoint")
        children = psutil.Process().children(recursive=True)
        workers = [one for one in children if "RayTrainWorker" in " ".join(one.cmdline())]
        assert len(workers) == 1, [one.cmdline() for one in children]
        workers[0].kill()

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill)
        run("train", "--shards", shards, "--out", out, *OPTIONS, says="going on after step")
    killed.result()
    same_result(out, whole[0])


@pytest.mark.ray
def test_ctrl_c_ends_a_run_with_a_line(shards: Path, tmp_path: Path) -> None:
    """Ray Train alone would end it with exit status 0, as if it were done."""
    out = tmp_path / "out"
    job = support.start("train", "--shards", shards, "--out", out, *OPTIONS, "--steps", 500, log=tmp_path / "log")
    support.wait_for(lambda: (out / "plan" / "snapshot.json").exists() or job.poll() is not None, "two checkpoints")
    job.send_signal(signal.SIGINT)
    status = job.wait(timeout=60)
    text = (tmp_path / "log").read_text()
    assert status == 130, text[-3000:]
    last_words = text.split("stopped: ")[1]
    assert 6 <= int(last_words.split(" of 500 steps done, up to the last checkpoint; the same command")[0]) < 500
    assert "Traceback" not in last_words
    assert not (out / "lease.json").exists()


@pytest.mark.ray
def test_more_than_this_machine_has_is_refused(shards: Path, tmp_path: Path) -> None:
    """The job waited for ever, without a word."""
    command = ("--shards", shards, "--out", tmp_path / "out", *OPTIONS, "--cpus-per-worker", 5000)
    text = run("train", *command, status=1)
    assert "the job would wait for ever: 1 workers of 5000 CPUs and 0 GPUs need 5000 CPUs" in text


@pytest.mark.ray
def test_a_second_driver_is_refused(shards: Path, whole: tuple[Path, str]) -> None:
    with Lease.acquire(str(whole[0])):
        text = run("train", "--shards", shards, "--out", whole[0], *OPTIONS, status=1)
    assert "another driver works on this store" in text


@pytest.mark.ray
def test_other_options_are_refused(whole: tuple[Path, str], shards: Path) -> None:
    command = ("--shards", shards, "--out", whole[0], *OPTIONS)
    text = run("train", *command, "--lr", 0.01, "--size", "64x48", status=1)
    assert "lr: the store has 0.001, this run has 0.01" in text
    assert "size: the store has '32x48', this run has '64x48'" in text


@pytest.mark.ray
def test_two_workers_do_what_one_does(shards: Path, tmp_path: Path) -> None:
    """Stride 8 takes three of the stages: the fourth gets no gradient in any worker. One worker needs no Ray."""
    options = ("--backbone", "mobilenetv1_100", "--pretrained", "false", "--stride", 8, "--size", "64x64")
    options = (
        *options,
        "--upsampler",
        "carafe",
        "--stages",
        4,
        "--lr",
        3e-5,
        "--steps",
        3,
        "--holdout",
        2,
        "--object-store-mb",
        100,
    )
    options = (*options, "--crf", 0.001, "--max-failed-fraction", 0.5)
    words = [str(word) for word in ("--shards", shards, "--out", tmp_path / "1", *options)]
    train(parse_args(TrainConfig, words, description="")[0])
    text = run("train", "--shards", shards, "--out", tmp_path / "2", *options, "--workers", 2)
    worse = log(tmp_path / "2")[-1]["worse_than_bilinear"]
    assert ("warning: the last weights predict held-out images worse than bilinear" in text) == worse
    one, two = log(tmp_path / "1"), log(tmp_path / "2")
    assert [line.keys() for line in one] == [line.keys() for line in two]
    assert two[0].pop("bilinear") == pytest.approx(one[0].pop("bilinear"), rel=1e-4)
    for line, other in zip(untimed(one), untimed(two), strict=True):
        assert other == pytest.approx(line, rel=1e-4)
    wanted, found = (tensors(tmp_path / name / "last.safetensors") for name in ("1", "2"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4, msg=lambda text, name=name: name + text)


@pytest.mark.ray
def test_what_is_trained_is_for_precompute(whole: tuple[Path, str], shards: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copy(whole[0] / "best.safetensors", tmp_path / "jbu.safetensors")
    command = ("--shards", shards, "--upsampler", "jbu", "--checkpoint", checkpoint, "--object-store-mb", 100)
    out = tmp_path / "store"
    text = run("precompute", *command, "--out", out, *BACKBONE, "--max-failed-fraction", 0.5)
    assert "2x3 to 32x48 by jbu" in text
    assert "input 13 = ok 12 + failed 1" in text
    assert "clean: " in run("verify", out)
    # Another backbone of as many channels.
    other = ("--backbone", "test_vit", "--pretrained", "false", "--layer", 2, "--size", "32x48")
    text = run("precompute", *command, "--out", tmp_path / "other", *other, status=1)
    assert "was made for test_vit, layer 5, norm model, with weights" in text
    assert "the backbone is test_vit, layer 2, norm model, with weights" in text


@pytest.mark.ray
def test_a_stack_for_stride_32_is_trained_and_used(shards: Path, tmp_path: Path) -> None:
    """Five stages. Four were made for every backbone, and 'train a deeper stack' could not be followed."""
    options = ("--backbone", "mobilenetv3_small_050", "--pretrained", "false", "--stride", 32, "--size", "64x96")
    options = (*options, "--object-store-mb", 100, "--max-failed-fraction", 0.5)
    out, store = tmp_path / "out", tmp_path / "store"
    text = run("train_jbu", "--shards", shards, "--out", out, *options, "--steps", 2, "--holdout", 2)
    assert "2x3 to 64x96" in text
    command = ("--shards", shards, "--upsampler", "jbu", "--checkpoint", out / "last.safetensors", *options)
    assert "2x3 to 64x96 by jbu" in run("precompute", *command, "--out", store)
    assert "clean: " in run("verify", store)

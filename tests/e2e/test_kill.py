"""SIGKILL in mid-run, for real: to the actor's process, and to the driver's."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.e2e import support

# A real ViT at its real size, so that a unit takes long enough to be killed in the middle of.
OPTIONS = ("--backbone", "vit_tiny_patch16_224", "--pretrained", "false", "--labels", "seg", "--pca", 32)
OPTIONS = (*OPTIONS, "--rows-per-shard", 2, "--object-store-mb", 100)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for tar in range(2):
        samples = [support.good_sample(f"k{tar}{n:02d}", 20 * tar + n) for n in range(15)]
        support.write_tar(folder / f"kill-{tar}.tar", [member for sample in samples for member in sample])
    return folder / "kill-*.tar"


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    support.run("precompute", "--shards", shards, "--out", out, *OPTIONS)
    return support.array_files(out)


@pytest.mark.ray
def test_the_job_survives_the_death_of_its_actor(shards: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = support.start("precompute", "--shards", shards, "--out", out, *OPTIONS, log=tmp_path / "log")
    support.wait_for(lambda: len(support.receipts(out)) >= 2, "two receipts")
    victim = json.loads(support.receipts(out)[0].read_bytes())["worker"]["pid"]
    os.kill(victim, signal.SIGKILL)
    assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-5000:]
    workers = {json.loads(path.read_bytes())["worker"]["pid"] for path in support.receipts(out)}
    assert len(workers) == 2, f"units were made by processes {workers}, of which {victim} was killed"
    assert "input 30 = ok 30 + failed 0" in (tmp_path / "log").read_text()
    assert support.array_files(out) == uninterrupted
    assert "clean" in support.run("verify", out)


@pytest.mark.ray
def test_the_same_command_goes_on_after_the_death_of_the_driver(
    shards: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("--shards", shards, "--out", out, *OPTIONS)
    job = support.start("precompute", *command, log=tmp_path / "log")
    support.wait_for(lambda: len(support.receipts(out)) >= 3, "three receipts")
    # Ray's workers follow their driver, and may finish the unit they were at; its agents, which do no work, linger.
    workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "Agent" not in "".join(p.cmdline())]
    job.kill()
    job.wait(timeout=60)
    alive = psutil.wait_procs(workers, timeout=60)[1]
    assert not alive, f"{alive} outlived the driver"
    done = {path: path.stat().st_mtime_ns for path in support.receipts(out)}
    assert 3 <= len(done) < 16, "the driver was to be killed in mid-run"
    text = support.run("precompute", *command)
    assert f"{len(done)} units done before, {16 - len(done)} to do" in text
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished unit was computed again"
    assert len(support.receipts(out)) == 16
    assert support.array_files(out) == uninterrupted

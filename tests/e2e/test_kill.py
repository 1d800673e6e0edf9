"""SIGKILL in mid-run, for real: to the actor's process, to one that loads, and to the driver's.

``benchmarks/random_kills.py`` does so at random times, as often as is asked for.
"""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.e2e import random_kills, support
from tests.e2e.in_process import run
from tests.e2e.random_kills import Campaign, Kill, OnDisk

OPTIONS = random_kills.OPTIONS


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    random_kills.write_shards(folder)
    return folder / "kill-*.tar"


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    run("precompute", "--shards", shards, "--out", out, *OPTIONS)
    return support.array_files(out)


@pytest.mark.ray
def test_the_job_survives_the_death_of_its_actor(shards: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # One actor: another one could do all the rest before that is back.
    options = (*OPTIONS, "--actors", 1)
    job = support.start("precompute", "--shards", shards, "--out", out, *options, log=tmp_path / "log")
    support.wait_for(lambda: len(support.receipts(out)) >= 2, "two receipts")
    victim = json.loads(support.receipts(out)[0].read_bytes())["worker"]["pid"]
    os.kill(victim, signal.SIGKILL)
    assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-5000:]
    workers = {json.loads(path.read_bytes())["worker"]["pid"] for path in support.receipts(out)}
    assert len(workers) == 2, f"units were made by processes {workers}, of which {victim} was killed"
    assert "input 30 = ok 30 + failed 0" in (tmp_path / "log").read_text()
    assert support.array_files(out) == uninterrupted
    assert "clean" in run("verify", out)


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
    # Also what the killed writers had begun is gone.
    assert "clean" in run("verify", out)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_loader_that_is_killed_changes_nothing_in_the_store(
    shards: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    # A kill whose time does not come before the job is done is left for another store.
    queue, seed, kills = ["loader"], 14, list[Kill]()
    while queue and seed < 17:
        place = OnDisk(tmp_path / f"out-{seed}")
        those = Campaign(place, str(shards), seed, tmp_path / f"logs-{seed}").run(queue, uninterrupted)
        kills, queue, seed = kills + those, queue[len(those) :], seed + 1
    print(random_kills.table(kills))
    assert [kill.kind for kill in kills] == ["loader"]

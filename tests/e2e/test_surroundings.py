"""The world around a job misbehaves: full disks, revoked access, signals, second drivers, processes that die."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.store.ledger import Ledger
from tests.e2e import support
from tests.e2e.in_process import run

SMALL = (*support.TINY, "--labels", "seg", "--rows-per-shard", 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for tar in range(2):
        samples = [support.good_sample(f"k{tar}{n:02d}", 20 * tar + n) for n in range(8)]
        support.write_tar(folder / f"s-{tar}.tar", [member for sample in samples for member in sample])
    return folder / "s-*.tar"


def one_line(text: str, name: str) -> str:
    """The job's error, which is one line and no traceback."""
    assert "Traceback" not in text, text[-4000:]
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name}: ")]
    return line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_stops_the_job_soon_and_resume_works(shards: Path, small_disk: Path) -> None:
    """All units were computed and thrown away, and running the command again was advised."""
    command = ("--shards", shards, "--out", small_disk / "out", *SMALL)
    text = run("precompute", *command, status=1)
    line = one_line(text, "precompute")
    assert "no space is left on the device" in line
    assert "The job stops here" in line
    done = len(support.receipts(small_disk / "out"))
    assert done < 8
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    text = run("precompute", *command)
    # An actor of the stopped job may have ended one more unit once there was space.
    before = re.search(r"(\d+) units done before", text)
    assert before is not None
    assert done <= int(before[1]) <= done + 1
    assert "input 16 = ok 16 + failed 0" in text
    assert "clean" in run("verify", small_disk / "out")


def keep_to_permissions() -> None:
    """Also root is then held to what a folder's mode allows."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_access_that_is_revoked_stops_the_job_with_the_place_and_the_cure(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("--shards", shards, "--out", out, *SMALL, "--rows-per-shard", 1)
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "jobs.precompute", *map(str, command)],
            cwd=support.ROOT, env=support.environment(), stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=keep_to_permissions,
        )  # fmt: skip
    place = out / "features.zarr" / "features"
    support.wait_for((place / "zarr.json").exists, "the arrays")
    place.chmod(0o555)
    try:
        status = job.wait(timeout=200)
    finally:
        place.chmod(0o755)
    text = (tmp_path / "log").read_text()
    assert status == 1, text[-3000:]
    line = one_line(text, "precompute")
    assert "ermission" in line
    assert "The job stops here" in line
    done = len(support.receipts(out))
    assert done < 8
    assert "input 16 = ok 16 + failed 0" in run("precompute", *command)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_in_seconds_with_one_line(
    shards: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    options = ("--backbone", "vit_tiny_patch16_224", "--pretrained", "false", "--pca", 32, "--object-store-mb", 100)
    job = support.start(
        "precompute", "--shards", shards, "--out", out, *options, "--rows-per-shard", 1, log=tmp_path / "log"
    )
    support.wait_for(lambda: len(support.receipts(out)) >= 1, "a receipt")
    job.send_signal(number)
    started = time.monotonic()
    assert job.wait(timeout=30) == status, (tmp_path / "log").read_text()[-3000:]
    assert time.monotonic() - started < 20
    text = (tmp_path / "log").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("precompute: stopped: ")]
    assert line.endswith("of 16 units done; the same command goes on")
    assert "Traceback" not in text
    assert not (out / "lease.json").exists()


def test_of_two_commands_started_at_once_one_makes_the_store_and_the_other_is_refused(
    shards: Path, tmp_path: Path
) -> None:
    """They left a store that neither could finish, for good."""
    out = tmp_path / "out"
    jobs = [
        support.start("precompute", "--shards", shards, "--out", out, *SMALL, "--pca", pca, log=tmp_path / f"log-{pca}")
        for pca in (4, 3)
    ]
    statuses = [job.wait(timeout=200) for job in jobs]
    logs = [(tmp_path / f"log-{pca}").read_text() for pca in (4, 3)]
    assert sorted(statuses) == [0, 1], "\n".join(logs)
    winner, loser = logs if statuses[0] == 0 else logs[::-1]
    assert "input 16 = ok 16 + failed 0" in winner
    line = one_line(loser, "precompute")
    # The later one may come when the other is at work, or when its store is there already.
    held = "LeaseError" in line and str(jobs[statuses.index(0)].pid) in line
    assert held or ("StoreMismatchError" in line and "pca: the store has" in line), line
    assert "clean" in run("verify", out)


def test_a_unit_that_kills_its_process_is_given_up_and_the_rest_is_stored(shards: Path, tmp_path: Path) -> None:
    """It was retried for ever. Whatever process takes unit 3 is killed, as a decoder's or driver's bug would."""
    out = tmp_path / "out"
    marker = out / "ledger" / "attempts" / "000000003.json"
    ended, killed = threading.Event(), []

    def kill() -> None:
        while not ended.is_set():
            try:
                pid = json.loads(marker.read_bytes())["pid"]
            except (FileNotFoundError, ValueError):
                time.sleep(0.002)
                continue
            if pid not in killed and len(killed) < 2:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        command = ("--shards", shards, "--out", out, *SMALL, "--unit-attempts", 2)
        text = run("precompute", *command, "--max-failed-fraction", 0.5)
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 2
    assert "input 16 = ok 14 + failed 2" in text
    assert "failed:      2  unit_failed" in text
    assert "clean" in run("verify", out)
    assert " 0 to do" in run("precompute", *command, "--max-failed-fraction", 0.5)
    text = run("precompute", *command, "--retry-failed", "unit_failed")
    assert "input 16 = ok 16 + failed 0" in text
    assert "clean" in run("verify", out)
    assert Ledger(str(out / "ledger")).attempts(3) == 0


def test_what_a_machine_cannot_give_is_refused_before_anything_waits(shards: Path, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    command = ("--shards", shards, "--out", tmp_path / "out", *SMALL)
    text = run("precompute", *command, "--cpus-per-actor", cores, status=1)
    assert "the job would wait for ever" in one_line(text, "precompute")
    assert "--cpus-per-actor" in text
    text = run("precompute", *command, "--actors", cores)
    assert "input 16 = ok 16 + failed 0" in text


def test_actors_are_as_many_as_the_machine_bears_and_another_number_goes_on(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("--shards", shards, "--out", out, *SMALL, "--rows-per-shard", 1)
    job = support.start("precompute", *command, "--actors", "auto", log=tmp_path / "log")
    support.wait_for(lambda: support.receipts(out), "a receipt")
    job.terminate()
    assert job.wait(timeout=60) == 143
    actors = min(len(os.sched_getaffinity(0)), 16 // 4)
    assert re.search(rf"^actors: {actors} \(auto: (one for each core|16 units to do, at least 4 for each)\)$",
                     (tmp_path / "log").read_text(), re.MULTILINE)  # fmt: skip
    text = run("precompute", *command)
    assert "input 16 = ok 16 + failed 0" in text
    assert "actors: " not in text


def test_units_that_all_fail_alike_stop_the_job_after_a_few(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("--shards", shards, "--out", out, *SMALL, "--rows-per-shard", 1)
    job = support.start("precompute", *command, log=tmp_path / "log")
    support.wait_for((out / "features.zarr" / "status" / "zarr.json").exists, "the arrays")
    # What only a broken file system does: no unit can be written, whatever is tried.
    (out / "features.zarr" / "features" / "c").write_bytes(b"a file where a folder must be")
    assert job.wait(timeout=200) == 1
    text = (tmp_path / "log").read_text()
    line = one_line(text, "precompute")
    assert "so the job stops" in line or "The job stops here" in line
    assert len(support.receipts(out)) < 8

"""Kills random processes of a running job at random times, until its store is finished.

A campaign fills one store. Its kills follow from its seed: for each, when in the run it happens, and which process of
the wanted kind it hits. After an actor or a loader was killed the same job has to go on; after the driver was, the same
command is run again. At the end the store must be clean, account for every sample, and hold the bytes of a store that
was made without interruption.
"""

import random
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from tests.e2e import support
from tests.e2e.objectstore import BUCKET, ObjectStore

# A real ViT at its real size, so that a unit takes long enough to be killed in the middle of.
OPTIONS: tuple[object, ...] = ("--backbone", "vit_tiny_patch16_224", "--pretrained", "false", "--labels", "seg")
# A unit that was begun at a kill counts an attempt, and a campaign may hit one more often than a user's job would.
OPTIONS = (*OPTIONS, "--pca", 32, "--rows-per-shard", 2, "--unit-attempts", 20, "--object-store-mb", 100)
SHARDS, SAMPLES_PER_SHARD = 2, 15
UNITS = SHARDS * -(-SAMPLES_PER_SHARD // 2)
# What stands in the command line of the processes of each kind: what Ray calls its workers while they work, and the
# module of the loaders' own child processes.
TITLES = {"actor": "Featurizer", "loader": "load_row", "decoder": "pipeline.decode.worker"}
KINDS = ("driver", "actor", "loader")
# A third of the kills happen before the first unit is done: models, plan, PCA and arrays are made then.
_EARLY = 1 / 3
_EARLY_SECONDS = 12.0
_LATER_SECONDS = 0.5
_LOADING_SECONDS = 0.5


class Place(Protocol):
    """Where a store is filled."""

    @property
    def url(self) -> str:
        """What is given as ``--out``."""

    @property
    def variables(self) -> Mapping[str, str]:
        """Environment variables that jobs need to reach it."""

    def receipts(self) -> dict[str, tuple[str, float]]:
        """For each receipt what changes when it is written again, and when it was written (seconds since 1970)."""

    def array_files(self) -> dict[str, bytes]:
        """Every object of every array."""


@dataclass(frozen=True)
class OnDisk:
    """A store in a local folder."""

    folder: Path

    @property
    def url(self) -> str:
        return str(self.folder)

    @property
    def variables(self) -> Mapping[str, str]:
        return {}

    def receipts(self) -> dict[str, tuple[str, float]]:
        files = {path.name: path.stat() for path in support.receipts(self.folder)}
        return {name: (str(stat.st_mtime_ns), stat.st_mtime) for name, stat in files.items()}

    def array_files(self) -> dict[str, bytes]:
        return support.array_files(self.folder)


@dataclass(frozen=True)
class OnS3:
    """A store below a prefix of an S3 server's bucket; jobs reach it through the server's fault proxy."""

    server: ObjectStore
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    @property
    def variables(self) -> Mapping[str, str]:
        return self.server.environment()

    def receipts(self) -> dict[str, tuple[str, float]]:
        return self.server.receipts(self.prefix)

    def array_files(self) -> dict[str, bytes]:
        return self.server.array_files(self.prefix)


@dataclass
class Kill:
    """One kill, and what came of it; times are seconds after the kill.

    ``done`` counts the receipts at the kill. ``next_receipt`` is when the next unit was done, by a process that
    survived or by one that replaced the killed one. ``finished`` is when the job had exited with status 0.
    ``recomputed`` counts units that had a receipt at the kill and got a new one afterwards.
    """

    seed: int
    kind: str
    title: str
    into_run: float
    done: int
    when: float
    receipts: dict[str, tuple[str, float]] = field(repr=False)
    next_receipt: float = 0.0
    finished: float = 0.0
    recomputed: int = 0


def write_shards(folder: Path) -> list[Path]:
    """The campaign's input: two shards of fifteen photographs with class maps."""
    paths = []
    for tar in range(SHARDS):
        numbers = range(SAMPLES_PER_SHARD)
        samples = [support.good_sample(f"k{tar}{n:02d}", 20 * tar + n, (480, 640)) for n in numbers]
        members = [member for sample in samples for member in sample]
        paths.append(support.write_tar(folder / f"kill-{tar}.tar", members))
    return paths


class Campaign:
    """Fills one store while killing processes of the job that does.

    ``kills`` lists what was killed so far; ``leftovers`` are processes that outlived their driver.
    """

    def __init__(self, place: Place, shards: str, seed: int, logs: Path) -> None:
        """
        Args:
            place: the store to fill; there is nothing in it yet.
            shards: ``--shards`` of the job.
            seed: of the times and the victims.
            logs: a folder for the output of each run of the job.
        """
        self.place = place
        self.command = ("--shards", shards, "--out", place.url, *OPTIONS)
        self.seed = seed
        self.kills: list[Kill] = []
        self.runs = 0
        self._random = random.Random(seed)
        self._logs = logs
        self._leftovers: list[psutil.Process] = []

    def run(self, kinds: Sequence[str], expected: Mapping[str, bytes]) -> list[Kill]:
        """Kill processes of these kinds, one after the other, until all were or the store is finished; then check it.

        Args:
            kinds: of the victims, ``driver`` or from :data:`TITLES`.
            expected: the arrays of a store made without interruption.

        Returns:
            The kills that took place: fewer than ``kinds`` where the job was done before all had their time.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            while not self._one_run(kinds):
                pass
            self._wait_for_workers()
            self._check(expected)
        finally:
            self._end_leftovers()
        return self.kills

    def log(self) -> Path:
        """The output of the current run."""
        return self._logs / f"run-{self.runs}.log"

    def _one_run(self, kinds: Sequence[str]) -> bool:
        """Start the job and kill until the driver is dead or the job has ended; whether it has ended by itself."""
        self.runs += 1
        self.log().parent.mkdir(parents=True, exist_ok=True)
        job = support.start("precompute", *self.command, log=self.log(), variables=self.place.variables)
        started = time.monotonic()
        try:
            while len(self.kills) < len(kinds):
                kind = kinds[len(self.kills)]
                victim = self._wait_for_victim(job, kind, started)
                if victim is None:
                    break
                receipts = self.place.receipts()
                self._leftovers += _descendants(victim.pid)
                title = _title(victim)
                try:
                    victim.kill()
                except psutil.NoSuchProcess:
                    continue  # it ended between being found and being killed; find another
                now = time.monotonic() - started
                self.kills.append(Kill(self.seed, kind, title, now, len(receipts), time.time(), receipts))
                if kind == "driver":
                    job.wait(timeout=60)
                    return False
            status = job.wait(timeout=400)
            ended = time.time()
        finally:
            if job.poll() is None:
                self._leftovers += _descendants(job.pid)
                job.kill()
                job.wait(timeout=60)
        text = self.log().read_text()
        assert status == 0, f"seed {self.seed}, after {self.kills}: exit status {status}\n{text[-5000:]}"
        for kill in self.kills:
            kill.finished = ended - kill.when
        return True

    def _wait_for_victim(self, job: subprocess.Popen[bytes], kind: str, started: float) -> psutil.Process | None:
        """Wait for the time of the next kill, then for a process of the kind; ``None`` where the job ends before."""
        before = len(self.place.receipts())
        early, share, delay = self._random.random(), self._random.random(), self._random.random()
        if kind in ("loader", "decoder"):
            # Loaders run ahead of the actor, and are done when the first units are.
            while job.poll() is None and not _working(job.pid, kind):
                time.sleep(0.01)
            time.sleep(share * _LOADING_SECONDS)
        elif kind == "driver" and early < _EARLY:
            time_of_kill = started + share * _EARLY_SECONDS
            while time.monotonic() < time_of_kill:
                if job.poll() is not None:
                    return None
                time.sleep(0.02)
        else:
            wanted = before + int(share * max(0, UNITS - before) / 2)
            while len(self.place.receipts()) < wanted:
                if job.poll() is not None:
                    return None
                time.sleep(0.1)
            time.sleep(delay * _LATER_SECONDS)
        while job.poll() is None:
            if kind == "driver":
                return psutil.Process(job.pid)
            if processes := _working(job.pid, kind):
                return self._random.choice(processes)
            time.sleep(0.005)
        return None

    def _check(self, expected: Mapping[str, bytes]) -> None:
        what = f"seed {self.seed}, after {[(kill.kind, kill.done) for kill in self.kills]}"
        samples = SHARDS * SAMPLES_PER_SHARD
        text = self.log().read_text()
        assert f"input {samples} = ok {samples} + failed 0" in text, f"{what}:\n{text[-3000:]}"
        receipts = self.place.receipts()
        for kill in self.kills:
            later = [written - kill.when for _, written in receipts.values() if written > kill.when]
            kill.next_receipt = min(later, default=0.0)
            kill.recomputed = sum(receipts[name][0] != mark for name, (mark, _) in kill.receipts.items())
        report = support.run("verify", self.place.url, variables=self.place.variables)
        assert f"{samples} samples = {samples} ok + 0 failed" in report, f"{what}:\n{report}"
        assert "clean" in report, f"{what}:\n{report}"
        arrays = self.place.array_files()
        assert arrays.keys() == expected.keys(), f"{what}: objects {sorted(arrays.keys() ^ expected.keys())[:10]}"
        different = sorted(name for name in arrays if arrays[name] != expected[name])
        assert not different, f"{what}: other bytes in {different[:10]}"

    def _wait_for_workers(self) -> None:
        """Processes follow a killed parent; a unit they are at may still be written, which must not differ."""
        workers = [p for p in self._leftovers if "ray::" in _title(p) or TITLES["decoder"] in _title(p)]
        alive = psutil.wait_procs(workers, timeout=60)[1]
        assert not alive, f"seed {self.seed}: {alive} outlived their parents by a minute"

    def _end_leftovers(self) -> None:
        """Ray's agents linger after their driver was killed, and do no work."""
        for process in self._leftovers:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(self._leftovers, timeout=30)
        self._leftovers.clear()


def uninterrupted(shards: str, out: Path) -> dict[str, bytes]:
    """The arrays of a store on disk that is made without interruption."""
    support.run("precompute", "--shards", shards, "--out", out, *OPTIONS)
    return support.array_files(out)


def table(kills: Sequence[Kill]) -> str:
    """The kills as a Markdown table."""
    lines = [
        "| seed | killed | s into the run | units done | s to the next unit | s to the end | done units recomputed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {kill.seed} | {kill.kind} | {kill.into_run:.1f} | {kill.done} of {UNITS} | {kill.next_receipt:.1f} | "
        f"{kill.finished:.1f} | {kill.recomputed} |"
        for kill in kills
    ]
    return "\n".join(lines)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _working(pid: int, kind: str) -> list[psutil.Process]:
    """The processes of a kind that work for the driver ``pid`` now, by number."""
    processes = [process for process in _descendants(pid) if TITLES[kind] in _title(process)]
    return sorted(processes, key=lambda process: process.pid)


def _title(process: psutil.Process) -> str:
    """The command line: Ray's workers have what they do in it."""
    try:
        return " ".join(process.cmdline()).strip()
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return ""

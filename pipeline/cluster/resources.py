"""What a job asks of a cluster, held against what the cluster has, before anything waits for what cannot come."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, floor

import ray

from pipeline.errors import ConfigError

__all__ = ["Allotment", "allot", "await_resources", "cluster_resources", "default_gpus"]

_WAIT_LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Allotment:
    """CPU cores and GPUs of each process, as Ray sets them aside.

    ``actors`` featurize, with ``cpus_per_actor`` and ``gpus_per_actor`` each; ``loader_cpus`` is for each task that
    reads and decodes; ``actors_per_node`` share the cores of a machine. ``hint`` says what is left unused, if anything.
    """

    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    loader_cpus: float
    actors_per_node: int
    hint: str = ""

    @property
    def cpus(self) -> float:
        """Cores without which the job would wait for ever: all actors, and one task that loads."""
        return self.actors * self.cpus_per_actor + self.loader_cpus

    @property
    def gpus(self) -> float:
        """GPUs without which the job would wait for ever."""
        return self.actors * self.gpus_per_actor

    def missing(self, has: Mapping[str, float]) -> str:
        """What a cluster with so much ``CPU`` and ``GPU`` lacks, and the cure; empty where nothing is missing."""
        cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
        texts = []
        if self.cpus > cpus + 1e-6:
            texts.append(
                f"{self.actors} actors of {self.cpus_per_actor:g} CPUs and a loader of {self.loader_cpus:g} need "
                f"{self.cpus:g} CPUs, there are {cpus:g}; give fewer --actors, or less --cpus-per-actor or "
                "--loader-cpus"
            )
        if self.gpus > gpus + 1e-6:
            texts.append(
                f"{self.actors} actors of {self.gpus_per_actor:g} GPUs need {self.gpus:g} GPUs, there are {gpus:g}; "
                "give fewer --actors, or --gpus-per-actor 0 to run on CPUs"
            )
        return "; ".join(texts)


def allot(
    has: Mapping[str, float],
    *,
    nodes: int,
    actors: int,
    cpus_per_actor: float | None,
    gpus_per_actor: float | None,
    loader_cpus: float | None,
) -> Allotment:
    """Fill in what is not given, so that it fits.

    Args:
        has: ``CPU`` and ``GPU`` of the whole cluster.
        nodes: machines in it.
        actors, cpus_per_actor, gpus_per_actor, loader_cpus: the options; ``None`` is filled in.
    """
    cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if gpus >= 1 else 0.0
    if loader_cpus is None:
        loader_cpus = 0.5 if cpus >= 1.5 else 0.25
        if cpus_per_actor == loader_cpus:
            loader_cpus /= 2
    if cpus_per_actor is None:
        # Hundredths: Ray counts resources in ten-thousandths, and people read these numbers.
        share = floor(100 * (cpus - loader_cpus) / actors) / 100
        cpus_per_actor = min(1.0, max(0.01, share))
        if cpus_per_actor == loader_cpus:
            cpus_per_actor -= 0.01
    hint = ""
    if gpus_per_actor and gpus > (used := actors * gpus_per_actor):
        hint = f"{gpus:g} GPUs are here and {used:g} will be used; --actors {floor(gpus / gpus_per_actor)} uses all"
    return Allotment(actors, cpus_per_actor, gpus_per_actor, loader_cpus, ceil(actors / max(1, nodes)), hint)


def await_resources(
    missing: Callable[[], str],
    *,
    seconds: float,
    report: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once the cluster has what the job needs; say every 30 s what is waited for.

    Args:
        missing: tells what the cluster does not have now, and what to do about it; empty where nothing is missing.
        seconds: how long machines may take to join; 0 where none can.
        report: prints a line.
        clock, sleep: tell and pass the time, in seconds.

    Raises:
        ConfigError: it did not come.
    """
    started = told = clock()
    while True:
        text = missing()
        if not text:
            return
        now = clock()
        if now - started >= seconds:
            wait = f" after {now - started:.0f} s" if seconds else ""
            raise ConfigError(f"the job would wait for ever{wait}: {text}")
        if now == started or now - told >= _WAIT_LINE_SECONDS:
            told = now
            report(f"waiting for machines, {now - started:.0f} of at most {seconds:.0f} s: {text}")
        sleep(min(2.0, seconds))


def cluster_resources() -> tuple[Mapping[str, float], int]:
    """CPUs and GPUs of the cluster that is connected to, and the number of its machines."""
    resources: Mapping[str, float] = ray.cluster_resources()
    return resources, sum(node["Alive"] for node in ray.nodes())


def default_gpus(wanted: float | None) -> float:
    """GPUs of one process: as many as wanted, by default 1 where the cluster has any."""
    if wanted is not None:
        return wanted
    return 1.0 if cluster_resources()[0].get("GPU", 0) >= 1 else 0.0

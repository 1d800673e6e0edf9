"""What a job asks of a cluster, held against what the cluster has, before anything waits for what cannot come."""

import time
from collections.abc import Callable, Mapping

import ray

from pipeline.errors import ConfigError

__all__ = ["await_resources", "cluster_machines", "cluster_resources", "default_gpus"]

_WAIT_LINE_SECONDS = 30.0


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


def cluster_resources() -> Mapping[str, float]:
    """CPUs and GPUs of the cluster that is connected to."""
    resources: Mapping[str, float] = ray.cluster_resources()
    return resources


def cluster_machines() -> list[Mapping[str, float]]:
    """``CPU``, ``GPU`` and ``memory`` (bytes that were free when Ray started there) of each machine of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def default_gpus(wanted: float | None) -> float:
    """GPUs of one process: as many as wanted, by default 1 where the cluster has any."""
    if wanted is not None:
        return wanted
    return 1.0 if cluster_resources().get("GPU", 0) >= 1 else 0.0

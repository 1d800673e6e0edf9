"""How the machines of a run are shared out: how many actors, and cores, GPUs and memory of each. Needs no Ray."""

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Literal

import torch

from pipeline.config.precompute import PrecomputeConfig
from pipeline.console import human_bytes
from pipeline.store.layout import Layout

__all__ = ["UNITS_IN_MEMORY", "Allotment", "Work", "actor_bytes", "allot", "allotment_of", "peak_bytes", "this_machine"]

# An actor takes seconds to start, and a unit about a second: one that gets fewer units would end later than without it.
_UNITS_OF_AN_ACTOR = 4
# The rest is left to loading tasks, the driver and the file cache.
_SHARE_OF_MEMORY = 0.8
# Bytes of a forward pass for each byte of its float32 images: ViT-L needs about 14 (tokens of 16 pixels, their MLP).
_ACTIVATIONS = 16
UNITS_IN_MEMORY = 4
"""Two units are under way in an actor, one computed and one written; each has its encoding beside it."""


@dataclass(frozen=True)
class Work:
    """What is to be done, as far as it bounds the number of actors.

    ``units`` that are left; ``bytes`` of memory that one actor needs; ``fits`` whether images are fitted one by one,
    for seconds each.
    """

    units: int
    bytes: int
    fits: bool


@dataclass(frozen=True)
class Allotment:
    """CPU cores and GPUs of each process, as they are set aside.

    ``actors`` featurize, with ``cpus_per_actor`` and ``gpus_per_actor`` each; ``loader_cpus`` is for each task that
    reads and decodes; ``actors_per_node`` share the cores of a machine. ``hint`` is a line for the user: why there are
    so many actors, or what they leave unused.
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

    def missing(self, machines: Sequence[Mapping[str, float]]) -> str:
        """What machines with so much ``CPU`` and ``GPU`` lack, and the cure; empty where nothing is missing."""
        cpus, gpus = (sum(machine.get(kind, 0.0) for machine in machines) for kind in ("CPU", "GPU"))
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
        # An actor lies on one machine, however much all of them have together.
        fit = _places(machines, self.cpus_per_actor, self.gpus_per_actor)
        if not texts and fit < self.actors:
            largest = max(machines, key=lambda machine: (machine.get("GPU", 0.0), machine.get("CPU", 0.0)))
            texts.append(
                f"of {self.actors} actors of {self.cpus_per_actor:g} CPUs and {self.gpus_per_actor:g} GPUs each, {fit} "
                f"fit on {len(machines)} machines, the largest of {largest.get('CPU', 0.0):g} CPUs and "
                f"{largest.get('GPU', 0.0):g} GPUs; give fewer --actors, or less --cpus-per-actor or --gpus-per-actor"
            )
        return "; ".join(texts)


def allotment_of(
    config: PrecomputeConfig, machines: Sequence[Mapping[str, float]], work: Work | None = None
) -> Allotment:
    """What a run's options come to on machines; see :func:`allot`."""
    return allot(
        machines,
        actors=config.actors,
        cpus_per_actor=config.cpus_per_actor,
        gpus_per_actor=config.gpus_per_actor,
        loader_cpus=config.loader_cpus,
        work=work,
    )


def allot(
    machines: Sequence[Mapping[str, float]],
    *,
    actors: int | Literal["auto"],
    cpus_per_actor: float | None,
    gpus_per_actor: float | None,
    loader_cpus: float | None,
    work: Work | None = None,
) -> Allotment:
    """Fill in what is not given, so that it fits.

    ``auto`` is one actor for each GPU, or without GPUs for each core; fewer where the memory of a machine or the units
    of the work do not suffice for so many; and one where nothing is there yet.

    Args:
        machines: ``CPU``, ``GPU`` and free ``memory`` in bytes of each; memory that is not named is no bound.
        actors, cpus_per_actor, gpus_per_actor, loader_cpus: the options; ``None`` and ``auto`` are filled in.
        work: bounds ``auto``; without it cores and GPUs alone do.
    """
    cpus, gpus = (sum(machine.get(kind, 0.0) for machine in machines) for kind in ("CPU", "GPU"))
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if gpus >= 1 else 0.0
    if loader_cpus is None:
        loader_cpus = 0.5 if cpus >= 1.5 else 0.25
        if cpus_per_actor == loader_cpus:
            loader_cpus /= 2
    room = [_room(machine, cpus_per_actor, gpus_per_actor) for machine in machines]
    hint = ""
    if isinstance(actors, int):
        count, used = actors, actors * gpus_per_actor
    else:
        count, hint = _fitting(machines, room, gpus_per_actor, work)
        if cpus_per_actor is not None:
            count = max(1, min(count, floor((cpus - loader_cpus) / cpus_per_actor + 1e-6)))
        hint, used = f"actors: {count} (auto: {hint})", gpus
    if gpus_per_actor and gpus > used:
        hint = f"{gpus:g} GPUs are here and {used:g} will be used; --actors {sum(room)} uses all"
    if cpus_per_actor is None:
        # Hundredths: Ray counts resources in ten-thousandths, and people read these numbers.
        share = floor(100 * (cpus - loader_cpus) / count) / 100
        cpus_per_actor = min(1.0, max(0.01, share))
        # Machines are not divided evenly by it: two of two cores have room for four of 0.7, not for five.
        homes = [machine for machine, fits in zip(machines, room, strict=True) if fits] if gpus_per_actor else machines
        while homes and cpus_per_actor > 0.01 and _places(homes, cpus_per_actor, 0.0) < count:
            cpus_per_actor = round(cpus_per_actor - 0.01, 2)
        if cpus_per_actor == loader_cpus:
            cpus_per_actor -= 0.01
    # Machines without a GPU share in nothing where actors have GPUs.
    together = ceil(count / max(1, sum(map(bool, room))))
    return Allotment(count, cpus_per_actor, gpus_per_actor, loader_cpus, together, hint)


def _room(machine: Mapping[str, float], cpus_per_actor: float | None, gpus_per_actor: float) -> int:
    """Actors for which a machine has GPUs, or without GPUs cores."""
    if not gpus_per_actor:
        return floor(machine.get("CPU", 0.0) / (cpus_per_actor or 1.0) + 1e-6)
    gpus = machine.get("GPU", 0.0)
    # A process has a share of one GPU, or whole GPUs.
    return int(gpus) * floor(1 / gpus_per_actor + 1e-6) if gpus_per_actor < 1 else floor(gpus / gpus_per_actor + 1e-6)


def _places(machines: Sequence[Mapping[str, float]], cpus_per_actor: float, gpus_per_actor: float) -> int:
    """Actors that fit on machines, each on one."""
    needs = {0.0, gpus_per_actor}
    return sum(min(_room(machine, cpus_per_actor, gpus) for gpus in needs) for machine in machines)


def _fitting(
    machines: Sequence[Mapping[str, float]], room: Sequence[int], gpus_per_actor: float, work: Work | None
) -> tuple[int, str]:
    """How many actors fit, and what they are bounded by."""
    actors = sum(room)
    kind = "GPU" if gpus_per_actor else "core"
    reason = f"one for each {kind}" if gpus_per_actor in (0.0, 1.0) else f"{gpus_per_actor:g} GPUs for each"
    if not actors:
        return 1, f"no {kind} for one is there yet"
    if work is None:
        return actors, reason
    borne = [
        min(fit, floor(_SHARE_OF_MEMORY * machine["memory"] / work.bytes)) if "memory" in machine else fit
        for machine, fit in zip(machines, room, strict=True)
    ]
    if sum(borne) < actors:
        memory = human_bytes(sum(machine.get("memory", 0.0) for machine in machines))
        actors, reason = max(1, sum(borne)), f"{memory} of free memory, about {human_bytes(work.bytes)} for each"
    least = 1 if work.fits else _UNITS_OF_AN_ACTOR
    if (most := max(1, work.units // least)) < actors:
        actors, reason = most, f"{work.units} units to do, at least {least} for each"
    return actors, reason


def actor_bytes(config: PrecomputeConfig, layout: Layout, peak: int) -> int:
    """Memory that an actor needs, in bytes.

    Args:
        config: gives the batch.
        layout: of the store: gives the bytes of a unit.
        peak: what the process that prepared the run has needed at most, with the same models in it.
    """
    images = 12 * config.batch_size * config.size.height * config.size.width
    return peak + _ACTIVATIONS * images + UNITS_IN_MEMORY * layout.rows_per_shard * layout.sample_bytes


def peak_bytes() -> int:
    """What this process has needed at most so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def this_machine() -> dict[str, float]:
    """``CPU``, ``GPU`` and free ``memory`` (bytes) of this machine, as far as this process may use them."""
    has = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
    free = [bytes_ for read in (_free_of_system, _free_of_container) if (bytes_ := read()) is not None]
    return has | ({"memory": float(min(free))} if free else {})


def _free_of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_container() -> int | None:
    """What the container's limit leaves (cgroup 2)."""
    try:
        limit, used = (
            Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
            for name in ("memory.max", "memory.current")
        )
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))

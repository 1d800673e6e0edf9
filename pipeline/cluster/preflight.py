"""What the main job asks of its machines, held against what they have, before anything is computed."""

import os
from collections.abc import Mapping
from dataclasses import replace

from pipeline.cluster.resources import Allotment, allot, await_resources, cluster_resources
from pipeline.config.precompute import PrecomputeConfig

__all__ = ["check_cores", "fill_in", "reserve"]


def check_cores(config: PrecomputeConfig) -> None:
    """Refuse what this machine can never give before Ray is started, which then looks closer.

    Raises:
        ConfigError: the job would wait for ever.
    """
    has = {"CPU": float(len(os.sched_getaffinity(0)))}
    await_resources(lambda: _allotment(config, has, 1).missing(has), seconds=0.0, report=print)


def _allotment(config: PrecomputeConfig, has: Mapping[str, float], nodes: int) -> Allotment:
    return allot(
        has,
        nodes=nodes,
        actors=config.actors,
        cpus_per_actor=config.cpus_per_actor,
        gpus_per_actor=config.gpus_per_actor,
        loader_cpus=config.loader_cpus,
    )


def fill_in(config: PrecomputeConfig, allotment: Allotment) -> PrecomputeConfig:
    """The options with what the allotment fills in."""
    return replace(
        config,
        cpus_per_actor=allotment.cpus_per_actor,
        loader_cpus=allotment.loader_cpus,
        gpus_per_actor=allotment.gpus_per_actor,
    )


def reserve(config: PrecomputeConfig, on_cluster: bool) -> Allotment:
    """What each process gets; on a cluster, machines that are to join are waited for.

    Raises:
        ConfigError: the job would wait for ever.
    """
    resources, nodes = cluster_resources()
    allotment = _allotment(config, resources, nodes)
    if allotment.hint:
        print(allotment.hint, flush=True)
    await_resources(
        lambda: allotment.missing(cluster_resources()[0]),
        # On one machine nothing will join.
        seconds=config.resource_timeout if on_cluster else 0.0,
        report=lambda text: print(text, flush=True),
    )
    return allotment

"""What the main job asks of its machines, held against what they have, before anything is computed."""

import os
from collections.abc import Mapping
from dataclasses import replace

from pipeline.cluster.connect import connect
from pipeline.cluster.resources import Allotment, allot, await_resources, cluster_resources
from pipeline.config.precompute import PrecomputeConfig

__all__ = ["check_cores", "start_ray"]


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


def start_ray(config: PrecomputeConfig, on_cluster: bool) -> tuple[PrecomputeConfig, Allotment]:
    """Join the cluster or start Ray here, and wait for the machines that are to join a cluster.

    Returns:
        The options with CPUs and GPUs filled in, and what each process gets.

    Raises:
        ConfigError: the job would wait for ever.
        EnvironmentFault: Ray cannot be started here.
    """
    connect(config.object_store_mb)
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
    filled = replace(
        config,
        cpus_per_actor=allotment.cpus_per_actor,
        loader_cpus=allotment.loader_cpus,
        gpus_per_actor=allotment.gpus_per_actor,
    )
    return filled, allotment

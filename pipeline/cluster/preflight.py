"""What the main job asks of its machines, held against what they have, before anything is computed."""

from dataclasses import replace

from pipeline.cluster.connect import connect
from pipeline.cluster.resources import await_resources, cluster_machines
from pipeline.compute.allotment import Allotment, Work, allotment_of, this_machine
from pipeline.config.precompute import PrecomputeConfig

__all__ = ["allot_work", "check_cores", "start_ray"]


def check_cores(config: PrecomputeConfig) -> None:
    """Refuse what this machine can never give before Ray is started, which then looks closer.

    Raises:
        ConfigError: the job would wait for ever.
    """
    has = this_machine()
    await_resources(lambda: allotment_of(config, [has]).missing([has]), seconds=0.0, report=print)


def start_ray(config: PrecomputeConfig, on_cluster: bool) -> tuple[PrecomputeConfig, Allotment]:
    """Join the cluster or start Ray here, and wait for the machines that are to join a cluster.

    With ``actors="auto"`` a machine for one actor is waited for; those that are there by then are counted.

    Returns:
        The options with the GPUs of an actor filled in, and what each process gets of the machines that are there.

    Raises:
        ConfigError: the job would wait for ever.
        EnvironmentFault: Ray cannot be started here.
    """
    connect(config.object_store_mb)
    allotment = allotment_of(config, cluster_machines())
    await_resources(
        lambda: allotment.missing(cluster_machines()),
        # On one machine nothing will join.
        seconds=config.resource_timeout if on_cluster else 0.0,
        report=lambda text: print(text, flush=True),
    )
    return replace(config, gpus_per_actor=allotment.gpus_per_actor), allotment


def allot_work(config: PrecomputeConfig, work: Work) -> tuple[PrecomputeConfig, Allotment]:
    """Share the machines that are there out to the work, and say in one line what decided it.

    Returns:
        The options with all that was left open filled in, and what each process gets.
    """
    allotment = allotment_of(config, cluster_machines(), work)
    if allotment.hint:
        print(allotment.hint, flush=True)
    filled = replace(
        config,
        actors=allotment.actors,
        cpus_per_actor=allotment.cpus_per_actor,
        loader_cpus=allotment.loader_cpus,
        gpus_per_actor=allotment.gpus_per_actor,
    )
    return filled, allotment

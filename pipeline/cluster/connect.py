"""Joins a Ray cluster, or starts Ray on this machine."""

import logging
import os

import ray
import ray.data

__all__ = ["connect", "default_gpus"]


def connect(object_store_mb: int, logs: ray.LoggingConfig | None = None) -> None:
    """Join the cluster that ``RAY_ADDRESS`` or ``ray job submit`` names, or start Ray on this machine.

    Args:
        object_store_mb: memory of Ray's object store where it is started here.
        logs: what the loggers of all processes are set to; by default as Ray does.
    """
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=logging.WARNING, logging_config=logs)
        else:
            ray.init(
                address="local",
                object_store_memory=object_store_mb << 20,
                include_dashboard=False,
                logging_level=logging.WARNING,
                logging_config=logs,
            )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block that fails is a fault of the program: units that fail come back as receipts that say so.
    context.max_errored_blocks = 0
    # Ray would walk the page tables of every worker each second to report its memory.
    context.memory_usage_poll_interval_s = None
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def default_gpus(wanted: float | None) -> float:
    """GPUs of one process: as many as wanted, by default 1 where the cluster has any."""
    if wanted is not None:
        return wanted
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0

"""Threads and devices of this process."""

import os

import numba
import torch
from torch import nn

__all__ = ["device_of", "set_threads"]


def set_threads(count: int | None, actors: int) -> int:
    """Use ``count`` threads in this process, by default the machine's cores shared among the actors."""
    # Ray sets OMP_NUM_THREADS to the cores it reserved, which on a machine of its own leaves the others idle.
    threads = count or max(1, len(os.sched_getaffinity(0)) // actors)
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return threads


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device

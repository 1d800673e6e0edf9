"""Threads and devices of this process."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch
from torch import nn

from pipeline.errors import ConfigError

__all__ = ["choose_device", "context_is_broken", "device_of", "set_threads", "share_threads", "threads_restored"]


def share_threads(count: int | None, processes: int) -> int:
    """Threads of a process: ``count``, by default this machine's cores shared among ``processes`` on this machine."""
    return count or max(1, len(os.sched_getaffinity(0)) // max(1, processes))


def set_threads(count: int | None, processes: int) -> int:
    """Use ``count`` threads for what the calling thread computes, see :func:`share_threads`; the number used.

    Both numba and OpenMP keep the number per calling thread, so every thread that computes calls this. Ray sets
    ``OMP_NUM_THREADS`` to the cores it reserved, which would leave the others idle.
    """
    threads = share_threads(count, processes)
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return threads


@contextmanager
def threads_restored() -> Iterator[None]:
    """Give the calling thread back the numbers of threads it had, whatever :func:`set_threads` sets inside."""
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def choose_device(gpus: float | None) -> torch.device:
    """The device of a process that was given ``gpus`` GPUs; ``None`` takes one where there is one.

    Ray does not hide GPUs from a process that asked for none, so what is visible says nothing.

    Raises:
        ConfigError: a GPU is asked for and torch sees none.
    """
    if gpus == 0 or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{gpus:g} GPUs are asked for and torch {torch.__version__} sees none: there is no GPU, its driver does "
            "not fit, or this torch is a build for CPUs; give --gpus-per-actor 0, or install torch for CUDA"
        )
    return torch.device("cuda")


def context_is_broken(error: BaseException) -> bool:
    """Whether a CUDA error leaves this process unable to use its GPU: any but running out of memory does."""
    accelerator_error = getattr(torch, "AcceleratorError", ())  # torch 2.8 and newer
    for one in (error, error.__cause__, error.__context__):
        if isinstance(one, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", str(one)):
            continue
        if isinstance(one, accelerator_error) or (isinstance(one, RuntimeError) and "CUDA error" in str(one)):
            return True
    return False


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device

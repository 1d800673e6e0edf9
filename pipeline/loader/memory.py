"""Memory for batches: used again once nobody holds the batch, as new pages cost more than what is copied into them."""

import math
import threading
import weakref
from collections import OrderedDict
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BatchMemory", "shared_memory"]

Bytes: TypeAlias = NDArray[np.uint8]
# One batch is worked on while the next one is read.
_KEPT_OF_A_SIZE = 2
# An array each has a size; the last batch of an epoch has others.
_KEPT_SIZES = 12
_SMALLEST = 1 << 20  # below, malloc does the same


class BatchMemory:
    """Gives memory for tensors. What was kept for the next ones does not travel to workers."""

    def __init__(self) -> None:
        self.made = 0
        """How many pieces were not there already."""
        # By their size; the size that was asked for last stands last.
        self._free: OrderedDict[int, list[Bytes]] = OrderedDict()
        # Memory may come back wherever Python collects garbage: also in here.
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type["BatchMemory"], tuple[()]]:
        return BatchMemory, ()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALLEST:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            kept = self._free.setdefault(size, [])
            self._free.move_to_end(size)
            while len(self._free) > _KEPT_SIZES:
                self._free.popitem(last=False)
            memory = kept.pop() if kept else None
        if memory is None:
            self.made += 1
            memory = np.empty(size, np.uint8)
        # The tensor, and every slice of it, holds this view: when it goes, nobody uses the memory any more.
        view = memory.view()
        weakref.finalize(view, self._give_back, memory).atexit = False
        return torch.from_numpy(view).view(dtype).view(shape)

    def _give_back(self, memory: Bytes) -> None:
        with self._lock:
            kept = self._free.get(len(memory))
            if kept is not None and len(kept) < _KEPT_OF_A_SIZE:
                kept.append(memory)


def shared_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of a DataLoader's worker in memory that the process that gets it shares.

    Nothing is copied on the way. Each such tensor takes a file descriptor as long as it lives.
    """
    size = math.prod(shape) * dtype.itemsize
    memory: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(memory).view(shape)

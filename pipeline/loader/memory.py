"""Memory for batches: used again once nobody holds the batch, as new pages cost more than what is copied into them."""

import math
import weakref
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

__all__ = ["BatchMemory"]

Bytes: TypeAlias = NDArray[np.uint8]
_KEPT = 4
_SMALLEST = 1 << 20  # below, malloc does the same


class BatchMemory:
    """Gives memory for tensors; what was kept for the next ones does not travel to workers."""

    def __init__(self) -> None:
        # By their id: several threads may take from it and give back to it, each step being one of Python's own.
        self._free: dict[int, Bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor.

        In a DataLoader's worker it lies in memory that is shared with the process that gets it: nothing is copied.
        """
        size = math.prod(shape) * dtype.itemsize
        if get_worker_info() is not None:
            shared: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
            return torch.empty(0, dtype=dtype).set_(shared).view(shape)
        if size < _SMALLEST:
            return torch.empty(shape, dtype=dtype)
        fitting = [memory for memory in list(self._free.values()) if len(memory) == size]
        taken = next((memory for memory in fitting if self._free.pop(id(memory), None) is not None), None)
        memory = np.empty(size, np.uint8) if taken is None else taken
        # The tensor, and every slice of it, holds this view: when it goes, nobody uses the memory any more.
        view = memory.view()
        weakref.finalize(view, self._give_back, memory).atexit = False
        return torch.from_numpy(view).view(dtype).view(shape)

    def _give_back(self, memory: Bytes) -> None:
        self._free[id(memory)] = memory
        for oldest in list(self._free)[:-_KEPT]:
            self._free.pop(oldest, None)

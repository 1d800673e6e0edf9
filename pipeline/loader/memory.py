"""Memory for batches: used again once nobody holds the batch, as new pages cost more than what is copied into them."""

import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BatchMemory", "SharedBatch", "SharedMemory"]

Bytes: TypeAlias = NDArray[np.uint8]
# One batch is worked on while the next one is read.
_KEPT_OF_A_SIZE = 2
# An array each has a size; the last batch of an epoch has others.
_KEPT_SIZES = 12
_SMALLEST = 1 << 20  # below, malloc does the same
# A worker has two batches waiting, one being read, and one that is worked on, with the next by then; twice as many.
_KEPT_SEGMENTS = 10
_Kept = TypeVar("_Kept")


def _of_size(kept: OrderedDict[int, list[_Kept]], size: int) -> list[_Kept]:
    """What is kept of a size; sizes that were not asked for lately are let go."""
    found = kept.setdefault(size, [])
    kept.move_to_end(size)
    while len(kept) > _KEPT_SIZES:
        kept.popitem(last=False)
    return found


def _tensor(
    memory: Bytes, shape: tuple[int, ...], dtype: torch.dtype, left: Callable[..., None], *arguments: Any
) -> Tensor:
    """A tensor in this memory; ``left`` is called once nobody holds it or a slice of it, as those hold this view."""
    view = memory.view()
    weakref.finalize(view, left, *arguments).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


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
            kept = _of_size(self._free, size)
            memory = kept.pop() if kept else None
        if memory is None:
            self.made += 1
            memory = np.empty(size, np.uint8)
        return _tensor(memory, shape, dtype, self._give_back, memory)

    def _give_back(self, memory: Bytes) -> None:
        with self._lock:
            kept = self._free.get(len(memory))
            if kept is not None and len(kept) < _KEPT_OF_A_SIZE:
                kept.append(memory)


class SharedMemory:
    """Gives a DataLoader's worker memory that the process which gets its batches reads in place and hands back.

    A batch in it is a :class:`SharedBatch`. Pages that are there already cost a fraction of new ones, which the kernel
    has to find and to clear. Memory that is not handed back, as somebody holds the batch, is never written to again.
    """

    def __init__(self) -> None:
        self.made = 0
        """How many pieces were not there already."""
        # By their size; the size that was asked for last stands last, and of a size the oldest stands first.
        self._segments: OrderedDict[int, list[_Segment]] = OrderedDict()

    def __reduce__(self) -> tuple[type["SharedMemory"], tuple[()]]:
        return SharedMemory, ()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, "_Segment"]:
        """An uninitialised tensor, and the segment it lies in."""
        size = math.prod(shape) * dtype.itemsize
        segments = _of_size(self._segments, size)
        segment = next((one for one in segments if one.free), None)
        if segment is None:
            self.made += 1
            segment = _Segment(size)
            segments.append(segment)
            del segments[:-_KEPT_SEGMENTS]
        return segment.tensor(shape, dtype), segment


class _Segment:
    """Memory that two processes see. Its last byte says whether the one that got it still uses it."""

    def __init__(self, size: int) -> None:
        self.storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size + 1)  # type: ignore[no-untyped-call]
        everything = _bytes_of(self.storage)
        self._bytes, self._used_there = everything[:size], everything[size:]
        self._used_here = False

    @property
    def free(self) -> bool:
        return not self._used_here and not self._used_there[0]

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._used_here = True
        return _tensor(self._bytes, shape, dtype, self._left)

    def _left(self) -> None:
        self._used_here = False

    def send(self, tensor: Tensor) -> torch.UntypedStorage | None:
        """What the other process opens to have the tensor; none where torch has to send a copy."""
        # A tensor that torch has sent by itself was moved elsewhere. A process that has the segment would hand it back
        # for both batches.
        if tensor.data_ptr() != self.storage.data_ptr() or self._used_there[0]:
            return None
        self._used_there[0] = 1
        return self.storage


def _bytes_of(storage: torch.UntypedStorage) -> Bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


class SharedBatch(dict[str, Any]):
    """A batch in shared memory. The process a worker's queue takes it to gets a plain dictionary.

    Copied or pickled elsewhere it is a dictionary like any other, and so is what a ``collate_fn`` makes of it: torch
    then copies tensors on their way as it always does.
    """

    def __init__(self, values: Mapping[str, Any], segments: Mapping[str, tuple[Tensor, _Segment]]) -> None:
        super().__init__(values)
        self._segments = segments

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)

    def sent(self) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
        """What a queue of torch's takes along: function and arguments."""
        values, opened = dict(self), {}
        for name, (tensor, segment) in self._segments.items():
            if values.get(name) is tensor and (storage := segment.send(tensor)) is not None:
                values[name] = None  # keeps its place
                opened[name] = (storage, tuple(tensor.shape), tensor.dtype)
        return _received, (values, opened)


def _received(values: dict[str, Any], opened: Mapping[str, Any]) -> dict[str, Any]:
    for name, (storage, shape, dtype) in opened.items():
        everything = _bytes_of(storage)
        values[name] = _tensor(everything[:-1], shape, dtype, _hand_back, everything[-1:], _forks)
    return values


def _hand_back(used_there: Bytes, forks: int) -> None:
    # A process forked in the meantime may hold the batch as well.
    if forks == _forks:
        used_there[0] = 0


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_count_fork)
ForkingPickler.register(SharedBatch, SharedBatch.sent)

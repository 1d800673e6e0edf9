"""Shards that are open for reading, with their indices, for all threads of a process."""

import os
import resource
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeAlias

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputChangedError
from pipeline.inputs import storage

__all__ = ["CRC_BYTES", "Bytes", "DamagedShardError", "OpenShard", "OpenShards", "Source", "is_intact"]

Bytes: TypeAlias = NDArray[np.uint8]
CRC_BYTES = 4
# The crc32c of any bytes with their own crc32c behind them, little-endian: the check needs no copy without its end.
_CRC_OF_CHECKED = 0x48674BC7
# An open file is a descriptor, and others need some too.
_MOST_FILES, _SHARE_OF_FILES = 128, 8
_MOST_OBJECTS = 1024
# A call costs as much as so many bytes more: to the system, and to an object store.
_LOCAL_GAP, _REMOTE_GAP = 16 << 10, 1 << 20
# How long an object is taken to be the one whose index was read.
_TRUSTED_SECONDS = 60.0


class DamagedShardError(Exception):
    """What is wrong with a shard."""


def is_intact(data: Bytes) -> bool:
    """Whether bytes with their crc32c at their end are what was written."""
    return int(google_crc32c.value(data)) == _CRC_OF_CHECKED


class Source(Protocol):
    """A file or an object; spans no further apart than ``gap`` bytes are better read at once."""

    gap: int
    size: int

    def read_into(self, target: Bytes, start: int) -> None:
        """Fill ``target`` with the bytes from ``start`` on."""

    def is_current(self) -> bool:
        """Whether this is still what the name stands for, or stays what it was."""


class _LocalFile:
    """A file that stays open, so that what its index says remains true when another file takes its name."""

    gap = _LOCAL_GAP

    def __init__(self, place: str) -> None:
        self._file = os.open(storage.local_path(place), os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def read_into(self, target: Bytes, start: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file, [target.data[done:]], start + done)
            if not count:
                raise DamagedShardError(f"it ends at byte {start + done}, and had {self.size} when it was opened")
            done += count

    def is_current(self) -> bool:
        return True


class _RemoteObject:
    """An object, of which ranges are read."""

    gap = _REMOTE_GAP

    def __init__(self, place: str, clock: Callable[[], float]) -> None:
        self._place, self._clock = place, clock
        self._stat = storage.stat(place)
        self._looked = clock()
        self.size = self._stat.size

    def read_into(self, target: Bytes, start: int) -> None:
        try:
            data = storage.fetch(self._place, start, start + len(target))
        except InputChangedError as error:
            raise DamagedShardError("it is gone, or has become shorter, since it was opened") from error
        target[:] = np.frombuffer(data, np.uint8)

    def is_current(self) -> bool:
        # Checksums alone do not tell: a chunk of another sample is intact as well.
        if self._clock() - self._looked < _TRUSTED_SECONDS:
            return True
        try:
            found = storage.stat(self._place)
        except FileNotFoundError:
            return False
        self._looked = self._clock()
        return found == self._stat


@dataclass(frozen=True, eq=False)
class OpenShard:
    """A shard and its index: ``[rows, *tiles, 2]``, (offset, length) of each chunk; none where it is one chunk."""

    source: Source
    index: NDArray[np.uint64] | None


@dataclass(frozen=True)
class _Missing:
    """There is no shard, and nobody looks for it until some time."""

    until: float


class OpenShards:
    """The shards of a store that were read last; what is closed is closed once no thread reads it any more."""

    def __init__(self, most_files: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            most_files: how many local files are open at once; by default 128, or an eighth of what the process may.
            clock: tells the seconds.
        """
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_files = most_files or max(2, min(_MOST_FILES, allowed // _SHARE_OF_FILES))
        self._clock = clock
        self._lock = threading.Lock()
        # The one that was used last stands last.
        self._shards: OrderedDict[str, OpenShard | _Missing] = OrderedDict()

    def get(self, place: str, index_shape: tuple[int, ...] | None) -> OpenShard | None:
        """The shard at a place; ``None`` where there is none: it holds nothing but fill values.

        Args:
            place: its path or URL.
            index_shape: ``[rows, *tiles]``; ``None`` where the shard is one chunk.

        Raises:
            DamagedShardError: its index is not what was written.
        """
        with self._lock:
            known = self._shards.get(place)
            if known is not None:
                self._shards.move_to_end(place)
        if isinstance(known, OpenShard) and known.source.is_current():
            return known
        if isinstance(known, _Missing) and self._clock() < known.until:
            return None
        shard = self._read(place, index_shape)
        with self._lock:
            # To look for a local file costs nothing.
            until = self._clock() + (0 if storage.is_local(place) else _TRUSTED_SECONDS)
            self._shards[place] = _Missing(until) if shard is None else shard
            self._shards.move_to_end(place)
            while len(self._shards) > (self._most_files if storage.is_local(place) else _MOST_OBJECTS):
                self._shards.popitem(last=False)
        return shard

    def drop(self, place: str) -> None:
        """Forget a shard, so that it is opened again."""
        with self._lock:
            self._shards.pop(place, None)

    def _read(self, place: str, index_shape: tuple[int, ...] | None) -> OpenShard | None:
        try:
            source = _LocalFile(place) if storage.is_local(place) else _RemoteObject(place, self._clock)
        except FileNotFoundError:
            return None
        return OpenShard(source, None if index_shape is None else _index(source, index_shape))


def _index(source: Source, shape: tuple[int, ...]) -> NDArray[np.uint64]:
    length = 16 * prod(shape) + CRC_BYTES
    if source.size < length:
        raise DamagedShardError(f"it has {source.size} bytes, and its index alone has {length}")
    data = np.empty(length, np.uint8)
    source.read_into(data, source.size - length)
    if not is_intact(data):
        raise DamagedShardError("its index is not what was written (its checksum differs)")
    return data[:-CRC_BYTES].view("<u8").reshape(*shape, 2)

"""Readers of a store's arrays, opened in the process and the thread that read."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch.utils.data import get_worker_info

from pipeline.errors import ForkError
from pipeline.inputs import storage
from pipeline.store.layout import Layout, open_arrays
from pipeline.store.open_shards import OpenShards
from pipeline.store.shard_reader import ArrayReader

__all__ = ["Readers"]

_MOST_THREADS = 4
# Which process first used a remote file system; a child made by fork finds its parent's number here.
_threaded_in: int | None = None


class Readers:
    """The arrays of a store, as one process reads them."""

    def __init__(self, store: str, names: Sequence[str], layout: Layout) -> None:
        """Open the arrays.

        Raises:
            ForkError: a parent of this process read a remote store.
            StoreFormatError: another program wrote the store.
        """
        global _threaded_in
        self.process = os.getpid()
        if not storage.is_local(store):
            if _threaded_in not in (None, self.process):
                raise ForkError(
                    f"{store}: process {self.process} was forked from {_threaded_in}, which had read a store through a "
                    "remote file system: its threads did not come along, and the first read would wait for them for "
                    "ever. Give the DataLoader multiprocessing_context='spawn' (or 'forkserver')"
                )
            _threaded_in = self.process
        specs = {spec.name: spec for spec in layout.arrays}
        arrays = open_arrays(store, names)
        shards = OpenShards()
        self._readers = {
            name: ArrayReader.of(store, arrays[name], specs[name], layout.rows_per_shard, shards) for name in names
        }
        self._of_thread = threading.local()
        # A DataLoader's worker is one of several; alone, a process has all cores.
        self._threads = 1 if get_worker_info() else min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool: ThreadPoolExecutor | None = None

    def here(self) -> dict[str, ArrayReader]:
        """The readers of this thread."""
        found: dict[str, ArrayReader] | None = getattr(self._of_thread, "readers", None)
        if found is None:
            found = {name: reader.copy() for name, reader in self._readers.items()}
            self._of_thread.readers = found
        return found

    def each(self, read: Callable[[int], None], count: int) -> None:
        """Call ``read`` with all numbers below ``count``, in several threads where this process has cores for them."""
        if count < 2 or self._threads < 2:
            for number in range(count):
                read(number)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        list(self._pool.map(read, range(count)))

"""Ray Data's rows on the driver: what goes in, what comes out, and how the threads that bring it end."""

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyarrow as pa
import ray.data

__all__ = ["MOST_BLOCKS", "number_rows", "read_rows"]

MOST_BLOCKS = 10_000
"""More blocks than this cost the driver more than they bring."""
# Ray Data's threads on the driver: the executor's, and those that fetch and convert blocks.
_THREADS = ("StreamingExecutor", "iter_threaded")
_THREAD_SECONDS = 10.0


def number_rows(count: int) -> ray.data.Dataset:
    """Rows ``{"id": n}``, each in a block of its own as far as there are not too many.

    Not by ``ray.data.range``, whose tasks ask for a whole CPU each: where actors and loaders have taken up the machine,
    they would wait for it for ever.
    """
    return ray.data.from_items([{"id": number} for number in range(count)], override_num_blocks=min(count, MOST_BLOCKS))


@contextmanager
def read_rows(dataset: ray.data.Dataset) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows of a data set as they are made; leaving the block stops the work that makes them.

    Once it is left, also by an error, no thread of Ray Data's is at work. One that let go of a block while Ray shuts
    down would end the whole process on the spot: with exit status 1, and without the line that says what happened.
    """
    # Without fetching ahead: Ray Data leaves the thread that does so behind where an iteration ends early.
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    try:
        yield (row for batch in batches for row in cast(pa.Table, batch).to_pylist())
    finally:
        cast(Generator[Any], batches).close()
        _await_threads()


def _await_threads() -> None:
    end = time.monotonic() + _THREAD_SECONDS
    for thread in threading.enumerate():
        if thread.name.startswith(_THREADS):
            thread.join(max(0.0, end - time.monotonic()))

"""Parquet files of a store, read by column, on one thread.

pyarrow's own threads would not survive a fork, and a loader's workers may be forked.
"""

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.inputs import storage

__all__ = ["open_parquet", "read_columns"]

# The footer, and all of a small file, come by the first request.
_TAIL_BYTES = 256 << 10


class _RangeFile(io.RawIOBase):
    """A remote file as a seekable stream: its last bytes are read once, other ranges as they are asked for."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._size = storage.stat(url).size
        self._tail_start = max(0, self._size - _TAIL_BYTES)
        self._tail = self._range(self._tail_start, self._size)
        self._position = 0

    def _range(self, start: int, stop: int) -> bytes:
        return storage.with_retries(lambda: storage.read_range(self._url, start, stop), what=f"reading {self._url}")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._position
        stop = self._size if size is None or size < 0 else min(self._size, start + size)
        if stop <= start:
            return b""
        self._position = stop
        if start >= self._tail_start:
            return self._tail[start - self._tail_start : stop - self._tail_start]
        return self._range(start, stop)

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_parquet(url: str) -> pq.ParquetFile:
    """A parquet file of a store, to read columns from.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is damaged.
        OSError: it cannot be read, after retries.
    """
    if storage.is_local(url):
        source: Any = storage.with_retries(lambda: pa.OSFile(storage.local_path(url)), what=f"opening {url}")
    else:
        source = pa.PythonFile(_RangeFile(url), mode="r")
    try:
        return pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(url, error) from error


def read_columns(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a parquet file; raises what :func:`open_parquet` raises."""
    file = open_parquet(url)
    try:
        return file.read(None if columns is None else list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(url, error) from error


def _damaged(url: str, error: Exception) -> StoreError:
    return StoreError(
        f"{url} cannot be read as parquet ({type(error).__name__}: {error}): it is damaged; verify the store with "
        "--repair, then run the job again"
    )

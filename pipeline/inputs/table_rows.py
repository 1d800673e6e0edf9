"""The bytes of images and labels that lie in tables: parquet files, and Arrow files of Hugging Face data sets."""

import errno
import threading
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from pipeline.console import human_bytes
from pipeline.errors import InputError, Reason, SampleError
from pipeline.inputs import storage
from pipeline.inputs.places import Place
from pipeline.inputs.remote import filesystem, mapped_errors
from pipeline.inputs.retry import retried
from pipeline.redaction import redact

__all__ = ["column_bytes", "damage_of", "large_groups", "open_arrow", "open_parquet", "read_cell", "row_batches"]

# Of a group of rows at most about so many bytes, and so many rows, are held at once. Smaller groups are held whole, so
# that rows may be asked for in any order.
_WINDOW, _ROWS = 32 << 20, 1024
# Bytes of a group that are worth a remark.
_LARGE_GROUP = 256_000_000
# What is read of a column at once. By default Arrow reads all that the columns have in a group before the first row.
_BUFFER = 4 << 20
_IN_PARTS: dict[str, Any] = {"buffer_size": _BUFFER, "pre_buffer": False}


def read_cell(place: Place, version: str, columns: Collection[str] = ()) -> bytes | None:
    """The bytes of a cell; None where it has none. Cells of one file are best asked for in the order of its rows.

    Args:
        place: of the cell.
        version: the size and stamp of its file.
        columns: of the same file that are asked for, too: they are read together.

    Raises:
        SampleError: ``UNDECODABLE``, its group of rows is damaged.
        InputError: a file that is no such table (any more).
        OSError: it cannot be read, after retries.
    """
    if place.file.endswith(".arrow"):
        column = _arrow(place.file, version).column(place.column)
        if place.number >= len(column):
            raise _no_row(place)
        return _bytes_of(column[place.number])
    _, bounds = _parquet(place.file, version)
    group = int(np.searchsorted(bounds, place.number, side="right")) - 1
    if place.number >= bounds[-1]:
        raise _no_row(place)
    return _bytes_of(_group(place.file, version, group).cell(place, {place.column, *columns}))


def _no_row(place: Place) -> InputError:
    return InputError(f"{place}: the file has no such row; run the job again, so that its plan is made anew")


def _bytes_of(cell: pa.Scalar) -> bytes | None:
    value = cell.get("bytes") if pt.is_struct(cell.type) else cell
    data: bytes | None = value.as_py() if cell.is_valid else None
    return data


@lru_cache(maxsize=4)
def _arrow(url: str, version: str) -> pa.Table:
    return open_arrow(url)


def open_arrow(url: str) -> pa.Table:
    """A local Arrow file as a table whose columns lie in the file: nothing is read yet.

    Raises:
        InputError: it is not one, or is damaged.
    """
    try:
        return pa.ipc.open_stream(pa.memory_map(storage.local_path(url))).read_all()
    except pa.ArrowException as error:
        raise InputError(f"{url} is no Arrow file that can be read: {error}; save the data set again") from error


@lru_cache(maxsize=4)
def _parquet(url: str, version: str) -> "tuple[pq.ParquetFile, np.ndarray[Any, Any]]":
    file = open_parquet(url)
    counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return file, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def open_parquet(url: str) -> pq.ParquetFile:
    """A local or remote parquet file, of which the footer is read.

    Raises:
        InputError: it is not one, or is damaged.
        OSError: it cannot be read, after retries.
    """

    def attempt() -> pq.ParquetFile:
        try:
            if storage.is_local(url):
                return pq.ParquetFile(storage.local_path(url), **_IN_PARTS)
            system, path = filesystem(url)
            file = _Remote(url, system.open(path, "rb", block_size=_BUFFER))
            return pq.ParquetFile(pa.PythonFile(file, mode="r"), **_IN_PARTS)
        except (pa.ArrowException, OSError) as error:
            damage = damage_of(error)
            if damage is None:
                raise
            raise InputError(f"{url} is no parquet file that can be read: {damage}; copy it again") from error

    try:
        return retried(attempt, url, "reading")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {url}; check the path") from error


class _Remote:
    """A remote file for Arrow. Its errors have a number, which tells them from Arrow's own of damaged data."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        """The next bytes of the file.

        Raises:
            OSError: whatever the store says, always with a number.
        """
        try:
            with mapped_errors(self._url):
                return bytes(self._file.read(size))
        except OSError as error:
            if error.errno is None:
                raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
            raise


def damage_of(error: Exception) -> str | None:
    """What Arrow says of damaged data; None of an error of the disk or the network, which has a number."""
    if isinstance(error, pa.ArrowException) or (isinstance(error, OSError) and error.errno is None):
        return " ".join(str(error).split())
    return None


def column_bytes(file: pq.ParquetFile, group: int, columns: Collection[str]) -> int:
    """The bytes that columns have in a group of rows when they are unpacked, by the file's footer."""
    facts = file.metadata.row_group(group)
    chunks = (facts.column(number) for number in range(facts.num_columns))
    own = tuple(f"{name}." for name in columns)
    return sum(int(chunk.total_uncompressed_size) for chunk in chunks if f"{chunk.path_in_schema}.".startswith(own))


def large_groups(cells: Iterable[Place]) -> list[str]:
    """A remark where the parquet files that cells lie in have groups of rows of more than 256 MB of them.

    Raises:
        InputError: a file is none that can be read.
        OSError: it cannot be read, after retries.
    """
    columns: dict[str, set[str]] = {}
    for cell in cells:
        if not cell.file.endswith(".arrow"):
            columns.setdefault(cell.file, set()).add(cell.column)
    largest, rows, url = 0, 0, ""
    for place, names in columns.items():
        file = open_parquet(place)
        for group in range(file.metadata.num_row_groups):
            if (size := column_bytes(file, group, names)) > largest:
                largest, rows, url = size, file.metadata.row_group(group).num_rows, place
    if largest <= _LARGE_GROUP:
        return []
    return [
        f"groups of rows of up to {human_bytes(largest)} ({rows} rows, in {redact(url)}): what reads from the middle "
        "of one reads all before it; write smaller groups, such as by "
        f"pyarrow.parquet.write_table(..., row_group_size={max(1, rows * _WINDOW // largest)})"
    ]


def row_batches(file: pq.ParquetFile, group: int, columns: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """A group of rows in order, a bounded part at a time. Errors are Arrow's own (:func:`damage_of`).

    Args:
        file: as :func:`open_parquet` gives it.
        group: its number.
        columns: paths of columns, such as ``image.bytes``.
    """
    names = sorted(columns)
    count = file.metadata.row_group(group).num_rows
    rows = min(_ROWS, _WINDOW * count // max(1, column_bytes(file, group, names)))
    yield from file.iter_batches(max(1, rows), row_groups=[group], columns=names)


class _Group:
    """The cells of a group of rows, a window of rows at a time. It moves forward; to go back it starts again."""

    def __init__(self, url: str, version: str, group: int) -> None:
        self._url, self._version, self._number = url, version, group
        self._start = int(_parquet(url, version)[1][group])
        self._columns: frozenset[str] = frozenset()
        # Training asks from several threads.
        self._lock = threading.Lock()
        # The row from which on the group is damaged, and how.
        self._damage: tuple[int, str] | None = None
        self._begin()

    def _begin(self) -> None:
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._window: pa.RecordBatch | None = None
        self._first = self._next = self._start

    def cell(self, place: Place, columns: Collection[str]) -> pa.Scalar:
        """A cell of the group; of the other columns the same rows are read with it.

        Raises:
            SampleError: ``UNDECODABLE``, the group is damaged there.
            InputError: the file has no such column.
            OSError: it cannot be read, after retries.
        """
        with self._lock:
            if not self._columns.issuperset(columns):
                self._columns |= frozenset(columns)
                self._damage = None
                self._begin()
            if place.number < self._first:
                self._begin()
            while self._damage is None and place.number >= self._next:
                what = f"reading rows of group {self._number} of"
                retried(lambda: self._advance(place.number), self._url, what)
            if self._damage is not None and place.number >= self._damage[0]:
                row, text = self._damage
                raise SampleError(
                    Reason.UNDECODABLE,
                    f"row {place.number}: group {self._number} of {self._url} cannot be read from row {row} on "
                    f"({text}); copy it again",
                )
            assert self._window is not None
            return self._window.column(place.column)[place.number - self._first]

    def _advance(self, row: int) -> None:
        """Read windows up to that with a row, or to damage before it. After another error the group starts again."""
        try:
            if self._batches is None:
                self._batches = row_batches(self._file(), self._number, self._paths())
            while self._next <= row:
                # Before the next one is read: two would take twice the memory.
                self._window = None
                self._window = next(self._batches)
                self._first, self._next = self._next, self._next + len(self._window)
        except StopIteration:
            self._damage = (self._next, "it has fewer rows than the file's footer says")
        except (pa.ArrowException, OSError) as error:
            text, reached = damage_of(error), self._next
            self._begin()
            if text is None:
                raise
            self._damage = (reached, text)

    def _file(self) -> pq.ParquetFile:
        return _parquet(self._url, self._version)[0]

    def _paths(self) -> list[str]:
        """Of structs the bytes alone."""
        schema = self._file().schema_arrow
        if missing := self._columns - set(schema.names):
            raise InputError(
                f"{self._url} has no column {', '.join(sorted(missing))} (any more), its columns are {schema.names}; "
                "run the job again, so that its plan is made anew"
            )
        return [f"{name}.bytes" if pt.is_struct(schema.field(name).type) else name for name in self._columns]


@lru_cache(maxsize=2)
def _group(url: str, version: str, group: int) -> _Group:
    return _Group(url, version, group)

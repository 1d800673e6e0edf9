"""The bytes of images and labels that lie in tables: parquet files, and Arrow files of Hugging Face data sets."""

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from pipeline.errors import InputError
from pipeline.inputs import storage
from pipeline.inputs.places import Place
from pipeline.inputs.remote import filesystem
from pipeline.inputs.retry import retried

__all__ = ["open_arrow", "open_parquet", "read_cell"]


def read_cell(place: Place, version: str) -> bytes | None:
    """The bytes of a cell; None where it has none. Cells of one file are best asked for in the order of its rows.

    Args:
        place: of the cell.
        version: the size and stamp of its file.

    Raises:
        InputError: a file that is no such table (any more).
        OSError: it cannot be read, after retries.
    """
    first, column = _block(place, version)
    if not 0 <= place.number - first < len(column):
        raise InputError(f"{place}: the file has no such row; run the job again, so that its plan is made anew")
    cell = column[place.number - first]
    value = cell if pt.is_binary(cell.type) or pt.is_large_binary(cell.type) else cell.get("bytes")
    data: bytes | None = value.as_py() if cell.is_valid else None
    return data


def _block(place: Place, version: str) -> tuple[int, pa.ChunkedArray]:
    """The rows around a cell that are read at once, of its column, and the number of the first."""
    if place.file.endswith(".arrow"):
        return 0, _arrow(place.file, version).column(place.column)
    _, bounds = _parquet(place.file, version)
    group = int(np.searchsorted(bounds, place.number, side="right")) - 1
    return int(bounds[group]), _group(place.file, version, group, place.column)


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
                return pq.ParquetFile(storage.local_path(url))
            system, path = filesystem(url)
            return pq.ParquetFile(pa.PythonFile(system.open(path, "rb"), mode="r"))
        except pa.ArrowException as error:
            raise InputError(f"{url} is no parquet file that can be read: {error}; copy it again") from error

    try:
        return retried(attempt, url, "reading")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {url}; check the path") from error


@lru_cache(maxsize=2)
def _group(url: str, version: str, group: int, column: str) -> pa.ChunkedArray:
    """A column of one group of rows; of a struct its bytes alone."""

    def attempt() -> pa.ChunkedArray:
        file, _ = _parquet(url, version)
        try:
            if not pt.is_struct(file.schema_arrow.field(column).type):
                return file.read_row_group(group, columns=[column]).column(0)
            cells = file.read_row_group(group, columns=[f"{column}.bytes"]).column(0)
        except (pa.ArrowException, KeyError) as error:
            raise InputError(f"{url}: group {group} of its rows cannot be read ({error}); copy it again") from error
        return pa.chunked_array(
            [pc.struct_field(chunk, "bytes") for chunk in cells.chunks], cells.type.field("bytes").type
        )

    return retried(attempt, url, f"reading rows of group {group} of")

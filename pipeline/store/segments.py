"""Segments: the receipts of a thousand units in one file, and which units are done.

A ledger holds open receipts, one JSON object a unit, and segments, which replace the thousand receipts they hold. A
segment is written when all of them are there, and before they are removed; where both are there, the segment counts.
"""

import re
from collections.abc import Iterable, Iterator, Set
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DamagedReceiptError
from pipeline.inputs import storage
from pipeline.store.parquet import read_columns

__all__ = [
    "UNITS_PER_SEGMENT",
    "DoneUnits",
    "Segment",
    "encode_segment",
    "list_done",
    "open_segment",
    "receipt_place",
    "segment_place",
    "segment_statuses",
    "segment_units",
]

UNITS_PER_SEGMENT = 1000
# One receipt is read with its row group, so these stay small.
_UNITS_PER_GROUP = 50
_SCHEMA = pa.schema(
    [("unit", pa.int64()), ("shard", pa.string()), ("status", pa.binary()), ("receipt", pa.binary())],
)
_OPEN_RECEIPT = re.compile(r"\d{6,}/(\d{9,})\.json")
_SEGMENT = re.compile(r"segments/(\d{6,})\.parquet")


def receipt_place(ledger: str, unit: int) -> str:
    """Where the open receipt of a unit lies. A thousand to a folder: listing stays fast with millions of units."""
    return storage.join(ledger, f"{unit // UNITS_PER_SEGMENT:06d}", f"{unit:09d}.json")


def segment_place(ledger: str, segment: int) -> str:
    """Where a segment lies."""
    return storage.join(ledger, "segments", f"{segment:06d}.parquet")


def segment_units(segment: int) -> range:
    """The units of a segment."""
    return range(segment * UNITS_PER_SEGMENT, (segment + 1) * UNITS_PER_SEGMENT)


class DoneUnits(Set[int]):
    """Numbers of the units that are done: whole segments, and single units with open receipts.

    Attributes:
        segments: numbers of the segments, sorted.
        open: units with an open receipt and no segment, sorted.
        leftover: segments beside which open receipts were left when compaction was cut short.
    """

    def __init__(self, segments: Iterable[int], receipts: Iterable[int]) -> None:
        self.segments: NDArray[np.int64] = np.unique(np.fromiter(segments, np.int64))
        units = np.unique(np.fromiter(receipts, np.int64))
        superseded = np.isin(units // UNITS_PER_SEGMENT, self.segments)
        self.open: NDArray[np.int64] = units[~superseded]
        self.leftover: NDArray[np.int64] = np.unique(units[superseded] // UNITS_PER_SEGMENT)

    def __len__(self) -> int:
        return len(self.segments) * UNITS_PER_SEGMENT + len(self.open)

    def __contains__(self, unit: object) -> bool:
        if not isinstance(unit, (int, np.integer)):
            return False
        return _holds(self.segments, int(unit) // UNITS_PER_SEGMENT) or _holds(self.open, int(unit))

    def __iter__(self) -> Iterator[int]:
        """The units, sorted."""
        last = max([int(self.open[-1])] if len(self.open) else [], default=-1)
        if len(self.segments):
            last = max(last, segment_units(int(self.segments[-1]))[-1])
        yield from np.flatnonzero(self.mask(last + 1)).tolist()

    @classmethod
    def _from_iterable(cls, units: Iterable[Any]) -> set[Any]:
        return set(units)

    def mask(self, units: int) -> NDArray[np.bool_]:
        """For each of the first ``units`` units whether it is done."""
        count = -(-units // UNITS_PER_SEGMENT)
        whole = np.zeros((count, UNITS_PER_SEGMENT), np.bool_)
        whole[self.segments[self.segments < count]] = True
        done = whole.reshape(-1)[:units]
        done[self.open[self.open < units]] = True
        return done

    def todo(self, units: int) -> NDArray[np.int64]:
        """Those of the first ``units`` units that are not done, sorted."""
        return np.flatnonzero(~self.mask(units))

    @property
    def compactable(self) -> list[int]:
        """Segments whose thousand receipts are all open, and those that left receipts behind."""
        segments, counts = np.unique(self.open // UNITS_PER_SEGMENT, return_counts=True)
        return sorted({*segments[counts == UNITS_PER_SEGMENT].tolist(), *self.leftover.tolist()})


def _holds(numbers: NDArray[np.int64], number: int) -> bool:
    position = int(np.searchsorted(numbers, number))
    return position < len(numbers) and int(numbers[position]) == number


def list_done(ledger: str) -> DoneUnits:
    """Which units are done, by one listing: receipts that are in a segment are not listed singly."""
    names = storage.list_files(ledger)
    return DoneUnits(
        (int(match[1]) for match in map(_SEGMENT.fullmatch, names) if match),
        (int(match[1]) for match in map(_OPEN_RECEIPT.fullmatch, names) if match),
    )


def encode_segment(units: Iterable[tuple[int, str, bytes, bytes]]) -> bytes:
    """A segment as a file, from (unit, digest of its shard, status bytes, receipt as JSON) of each unit, in order."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, _SCHEMA, compression="zstd", use_dictionary=["shard"], write_statistics=False, write_page_checksum=True
    ) as writer:
        batch: list[tuple[int, str, bytes, bytes]] = []
        for one in units:
            batch.append(one)
            if len(batch) == _UNITS_PER_GROUP:
                writer.write_table(pa.Table.from_arrays(list(map(pa.array, zip(*batch, strict=True))), schema=_SCHEMA))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_arrays(list(map(pa.array, zip(*batch, strict=True))), schema=_SCHEMA))
    return bytes(sink.getvalue().to_pybytes())


class Segment:
    """A segment in memory, as compressed as it was stored. Safe to use from several threads."""

    def __init__(self, place: str) -> None:
        """
        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read, after retries.
        """
        self.place = place
        self.number = int(place.rsplit("/", 1)[-1].partition(".")[0])
        self._data = storage.read_bytes(place)
        self._lock = Lock()
        self._group: tuple[int, list[bytes]] = (-1, [])

    def receipt(self, unit: int) -> bytes:
        """The receipt of a unit as JSON.

        Raises:
            DamagedReceiptError: the segment is damaged where this receipt lies.
        """
        group, position = divmod(unit - segment_units(self.number)[0], _UNITS_PER_GROUP)
        with self._lock:
            if self._group[0] != group:
                self._group = (group, self._read_group(group, unit))
            return self._group[1][position]

    def _read_group(self, group: int, unit: int) -> list[bytes]:
        first = segment_units(self.number)[0] + group * _UNITS_PER_GROUP
        try:
            file = pq.ParquetFile(pa.BufferReader(self._data), page_checksum_verification=True)
            table = file.read_row_group(group, ["unit", "receipt"], use_threads=False)
            if table["unit"].to_pylist() != list(range(first, first + _UNITS_PER_GROUP)):
                raise ValueError(f"row group {group} does not hold units {first} to {first + _UNITS_PER_GROUP - 1}")
            receipts: list[bytes] = table["receipt"].to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            raise DamagedReceiptError(
                unit,
                f"{self.place} is no segment of receipts ({type(error).__name__}: {error}): it is damaged; verify "
                "the store with --repair, then run the job again",
            ) from error
        return receipts


def open_segment(ledger: str, number: int) -> Segment | None:
    """A segment of a ledger, ``None`` where there is none; remembered as long as the file is the same."""
    place = segment_place(ledger, number)
    try:
        state = storage.stat(place)
        return _remembered(place, state.size, state.stamp) if state.stamp else Segment(place)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=2)
def _remembered(place: str, size: int, stamp: str) -> Segment:
    return Segment(place)


def segment_statuses(ledger: str, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(samples of each unit int64 ``[1000]``, status of all samples one behind the other uint8), of a segment.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is damaged.
    """
    column = read_columns(segment_place(ledger, number), ["status"])["status"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    texts: list[bytes] = column.to_pylist()
    return np.fromiter(map(len, texts), np.int64, len(texts)), np.frombuffer(b"".join(texts), np.uint8)

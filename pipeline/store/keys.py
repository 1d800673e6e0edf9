"""Keys of a store's samples: of a complete store by its index, else by its receipts.

They are read where they are asked for, a part at a time, and only some parts are remembered: a store of a hundred
million samples has gigabytes of keys.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import DamagedReceiptError, StoreError
from pipeline.inputs import storage
from pipeline.inputs.manifest import shard_name
from pipeline.store.layout import Layout
from pipeline.store.parquet import read_columns
from pipeline.store.partitions import partition_place
from pipeline.store.rows import read_all
from pipeline.store.segments import UNITS_PER_SEGMENT, list_done, open_segment, receipt_place

__all__ = ["FoundSample", "SampleKeys"]


@dataclass(frozen=True)
class FoundSample:
    """A sample that has the key that was looked up; ``shard`` is the URL of its input shard."""

    row: int
    shard: str
    status: str
    reason: str


@dataclass(frozen=True, eq=False)
class _Part:
    """The samples of a partition of the index, or of a unit: their rows, sorted, and their keys."""

    rows: NDArray[np.int64]
    keys: pa.ChunkedArray

    @cached_property
    def bytes(self) -> int:
        return int(self.rows.nbytes + self.keys.nbytes)


class SampleKeys:
    """The keys of a store's samples. What it remembers does not travel to workers."""

    def __init__(self, out: str, attributes: Mapping[str, Any], remembered_bytes: int = 64 << 20) -> None:
        """
        Args:
            out: the store.
            attributes: of the store.
            remembered_bytes: of keys that are kept in memory; a part is kept whatever it takes.
        """
        self._out = out
        self._ledger = storage.join(out, "ledger")
        self._layout = Layout.from_dict(attributes["layout"])
        self._complete = bool(attributes.get("complete"))
        self._rows_per_part = self._layout.rows_per_shard * (UNITS_PER_SEGMENT if self._complete else 1)
        self._remembered_bytes = remembered_bytes
        # The one that was used last stands last.
        self._parts: dict[int, _Part] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}

    def key(self, row: int) -> str:
        """The key of a row that holds a sample.

        Raises:
            StoreError: its part of the index, or its receipt, is missing or damaged.
        """
        number = row // self._rows_per_part
        part = self._parts.pop(number, None) or self._load(number)
        self._parts[number] = part
        self._forget()
        position = int(np.searchsorted(part.rows, row))
        if position == len(part.rows) or int(part.rows[position]) != row:
            raise StoreError(
                f"{self._out} lists no sample in row {row}: its index or its receipts were changed since it was "
                "opened; open it again"
            )
        return str(part.keys[position].as_py())

    def find(self, key: str) -> list[FoundSample]:
        """All samples with this key, failed ones included, in the order of rows.

        Looks through all keys of the store: a second or two for ten million of a local one.

        Raises:
            StoreError: a part of the index, or a receipt, is missing or damaged.
        """
        if self._complete:
            count = -(-self._layout.rows // self._rows_per_part)
            numbers = read_all(self._out, lambda number: self._indexed(number, key), range(count))
            return [sample for part in numbers for sample in part]
        return [sample for unit in list_done(self._ledger) for sample in self._received(unit, key)]

    def _forget(self) -> None:
        while len(self._parts) > 1 and sum(part.bytes for part in self._parts.values()) > self._remembered_bytes:
            self._parts.pop(next(iter(self._parts)))

    def _load(self, number: int) -> _Part:
        if self._complete:
            table = self._columns(number, ["row", "key"])
            return _Part(np.asarray(table["row"].to_numpy(), np.int64), table["key"])
        samples = self._receipt(number)["samples"]
        rows = np.array([one["row"] for one in samples], np.int64)
        return _Part(rows, pa.chunked_array([pa.array([one["key"] for one in samples], pa.string())]))

    def _columns(self, number: int, names: list[str]) -> pa.Table:
        place = partition_place(self._out, number)
        try:
            return read_columns(place, names)
        except FileNotFoundError as error:
            raise StoreError(
                f"{place} is missing, and {self._out} was complete when it was opened: run the job that made the store "
                "again, which writes it anew"
            ) from error

    def _indexed(self, number: int, key: str) -> list[FoundSample]:
        part = self._parts.get(number)
        keys = self._columns(number, ["key"])["key"] if part is None else part.keys
        positions = np.flatnonzero(pc.equal(keys, key).to_numpy())
        if not len(positions):
            return []
        table = self._columns(number, ["row", "shard", "status", "reason"]).take(positions)
        return [FoundSample(**row) for row in table.to_pylist()]

    def _received(self, unit: int, key: str) -> list[FoundSample]:
        receipt = self._receipt(unit)
        found = [one for one in receipt["samples"] if one["key"] == key]
        return [
            FoundSample(one["row"], self._shard(receipt["unit"]["shard"]), one["status"], one["reason"])
            for one in found
        ]

    def _receipt(self, unit: int) -> dict[str, Any]:
        place = receipt_place(self._ledger, unit)
        segment = open_segment(self._ledger, unit // UNITS_PER_SEGMENT)
        try:
            data = segment.receipt(unit) if segment else storage.read_bytes(place)
        except FileNotFoundError as error:
            # It may have been compacted between the two looks.
            segment = open_segment(self._ledger, unit // UNITS_PER_SEGMENT)
            if segment is None:
                raise StoreError(f"{place} is gone since {self._out} was opened; open it again") from error
            data = segment.receipt(unit)
        try:
            content: dict[str, Any] = json.loads(data)
        except ValueError as error:
            raise DamagedReceiptError(
                unit, f"{place} is no receipt ({error}): it is damaged; verify the store with --repair"
            ) from error
        return content

    def _shard(self, number: int) -> str:
        plan = json.loads(storage.read_bytes(storage.join(self._out, "plan", "plan.json")))
        return shard_name(plan["shards"][number]["url"])

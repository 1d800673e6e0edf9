"""Receipts: a unit of work is done when its receipt exists, and not before.

The receipt is written, atomically, after all of the unit's data is durable. It is keyed by the unit (input shard,
samples, rows), never by a worker, so any later run of the same plan finds it.
"""

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby, islice
from typing import TypeVar

from pipeline.errors import DamagedReceiptError, StoreError, StoreFormatError
from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey
from pipeline.store.layout import FAILED, OK
from pipeline.store.partitions import partition_place
from pipeline.store.receipt import Receipt, SampleRecord
from pipeline.store.segments import (
    UNITS_PER_SEGMENT,
    DoneUnits,
    Segment,
    encode_segment,
    list_done,
    open_segment,
    receipt_place,
    segment_place,
    segment_units,
)

__all__ = ["Ledger", "Receipt", "SampleRecord"]

T = TypeVar("T")
_THREADS = 16
# Receipts in memory at once while a segment is written.
_READ_AHEAD = 100


class Ledger:
    """The receipts of one store: open ones, an object a unit, and segments of a thousand."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: the folder ``OUT/ledger`` of the store ``OUT``.
        """
        self.url = url
        self._out = url.rstrip("/").rpartition("/")[0]

    def commit(self, receipt: Receipt) -> None:
        """Mark a unit as done. Its data must be durable by now."""
        if receipt.error:
            raise StoreError(f"{receipt.unit} failed ({receipt.error}) and cannot be committed")
        place, data = receipt_place(self.url, receipt.unit.unit), receipt.to_json()
        storage.write_atomic(place, data)

    def get(self, key: UnitKey, shard: str) -> Receipt | None:
        """The receipt of a unit that is done, or ``None``.

        Args:
            key: the unit.
            shard: digest of its input shard.

        Raises:
            DamagedReceiptError: there is a receipt that is damaged.
            StoreError: there is a receipt, and it belongs to another input or another unit.
            OSError: it cannot be read, after retries.
        """
        # In this order: a receipt that is compacted between the two looks is in the segment by then.
        data = self._open_receipt(key.unit)
        segment = open_segment(self.url, key.unit // UNITS_PER_SEGMENT)
        if segment is not None:
            data = segment.receipt(key.unit)
        return None if data is None else self._checked(data, key, shard)

    def _open_receipt(self, unit: int) -> bytes | None:
        try:
            return storage.read_bytes(receipt_place(self.url, unit))
        except FileNotFoundError:
            return None

    def _parsed(self, data: bytes, unit: int) -> Receipt:
        try:
            return Receipt.from_json(data)
        except (ValueError, KeyError, TypeError, StoreFormatError) as error:
            raise DamagedReceiptError(
                unit,
                f"{receipt_place(self.url, unit)} is no receipt ({type(error).__name__}: {error}): it is damaged; "
                "verify the store with --repair, then run the job again, which computes this unit anew",
            ) from error

    def _checked(self, data: bytes, key: UnitKey, shard: str) -> Receipt:
        receipt = self._parsed(data, key.unit)
        if (receipt.unit, receipt.shard) != (key, shard):
            raise StoreError(
                f"{receipt_place(self.url, key.unit)} is the receipt of {receipt.unit} of input {receipt.shard[:12]}, "
                f"expected {key} of input {shard[:12]}; the ledger was mixed up with another store's: restore it, or "
                "start anew"
            )
        return receipt

    def done(self) -> DoneUnits:
        """Numbers of the units that are done; only segments and open receipts are listed, and nothing is read."""
        return list_done(self.url)

    def receipts(
        self, keys: Iterable[tuple[UnitKey, str]], threads: int = _THREADS
    ) -> Iterator[tuple[UnitKey, Receipt | None]]:
        """(key, receipt or ``None``) of units and their shards' digests, in this order, open ones by several threads.

        A segment is looked up once for all neighbouring units that lie in it. Raises what :meth:`get` raises.
        """

        def read(pair: tuple[UnitKey, str]) -> tuple[UnitKey, Receipt | None]:
            data = self._open_receipt(pair[0].unit)
            return pair[0], None if data is None else self._checked(data, *pair)

        with ThreadPoolExecutor(threads) as pool:
            for number, group in groupby(keys, lambda pair: pair[0].unit // UNITS_PER_SEGMENT):
                segment = open_segment(self.url, number)
                for batch in _batched(group, 64 * threads):
                    if segment is None:
                        yield from pool.map(read, batch)
                    else:
                        for key, shard in batch:
                            yield key, self._checked(segment.receipt(key.unit), key, shard)

    def compact(self, number: int) -> bool:
        """Replace the open receipts of a segment's thousand units by the segment, once all are there.

        The segment is durable before the first receipt is removed; what a crash leaves behind is removed by the next
        call.

        Returns:
            Whether there is a segment now.

        Raises:
            DamagedReceiptError: a receipt is damaged; nothing was changed.
        """
        place = segment_place(self.url, number)
        if open_segment(self.url, number) is None:
            if not self._listed(number).issuperset(segment_units(number)):
                return False
            data = encode_segment(self._rows(number))
            storage.write_atomic(place, data)
        self._remove_receipts(sorted(self._listed(number)))
        return True

    def _listed(self, number: int) -> frozenset[int]:
        """Units of a segment with an open receipt."""
        folder = storage.join(self.url, f"{number:06d}")
        names = storage.list_files(folder)
        return frozenset(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())

    def _rows(self, number: int) -> Iterator[tuple[int, str, bytes, bytes]]:
        def read(unit: int) -> tuple[int, str, bytes, bytes]:
            data = self._open_receipt(unit)
            if data is None:
                raise StoreError(f"{receipt_place(self.url, unit)} is gone while its segment is written; run again")
            receipt = self._parsed(data, unit)
            if receipt.unit.unit != unit:
                raise DamagedReceiptError(unit, f"{receipt_place(self.url, unit)} is the receipt of {receipt.unit}")
            status = bytes(OK if record.status == "ok" else FAILED for record in receipt.samples)
            return unit, receipt.shard, status, data

        with ThreadPoolExecutor(_THREADS) as pool:
            for batch in _batched(segment_units(number), _READ_AHEAD):
                yield from pool.map(read, batch)

    def reopen(self, units: Iterable[int]) -> list[int]:
        """Take the receipts of units back, so that the next run computes them anew.

        Of a segment the other receipts are written as open ones first; those that are damaged with it are taken back
        as well. The index's partition is removed before the segment, so that it never outlives what it was built from.

        Returns:
            The units that are open now and were done, or damaged, before; sorted.
        """
        taken: list[int] = []
        for number, group in groupby(sorted(set(units)), lambda unit: unit // UNITS_PER_SEGMENT):
            chosen = list(group)
            segment = open_segment(self.url, number)
            if segment is not None:
                chosen = sorted({*chosen, *self._write_back(segment, set(chosen))})
            listed = self._listed(number)
            _remove(partition_place(self._out, number))
            self._remove_receipts([unit for unit in chosen if unit in listed])
            if segment is not None:
                _remove(segment.place)
            taken += chosen if segment is not None else [unit for unit in chosen if unit in listed]
        return taken

    def _write_back(self, segment: Segment, without: set[int]) -> list[int]:
        """Write a segment's receipts as open ones; returns the units whose receipts are damaged."""

        def write(unit: int) -> int | None:
            place = receipt_place(self.url, unit)
            try:
                data = segment.receipt(unit)
                self._parsed(data, unit)
            except DamagedReceiptError:
                return unit
            storage.write_atomic(place, data)
            return None

        others = [unit for unit in segment_units(segment.number) if unit not in without]
        with ThreadPoolExecutor(_THREADS) as pool:
            return [unit for unit in pool.map(write, others) if unit is not None]

    def _remove_receipts(self, units: list[int]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(storage.remove, [receipt_place(self.url, unit) for unit in units]))
        if units:
            _sync_folder(receipt_place(self.url, units[0]))

    def attempts(self, unit: int) -> int:
        """How many attempts at a unit began and did not end: their processes died. 0 where the marker is damaged."""
        place = self._attempt_place(unit)
        try:
            return int(json.loads(storage.read_bytes(place))["count"])
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError):
            # A marker only bounds how often a unit is tried: the count begins anew, and no unit is lost by it.
            return 0

    def begin_attempt(self, unit: int, earlier: int) -> None:
        """Mark that an attempt at a unit begins, where ``earlier`` ones (:meth:`attempts`) did not end."""
        marker = {"count": earlier + 1, "host": platform.node(), "pid": os.getpid(), "time": time.time()}
        storage.write_atomic(self._attempt_place(unit), json.dumps(marker).encode())

    def end_attempt(self, unit: int) -> None:
        """Remove the marker: the attempt ended, well or with an error, and its process lives."""
        storage.remove(self._attempt_place(unit))

    def forgive_attempts(self) -> None:
        """Count attempts that are under way as not begun: their run was stopped, and they did not end it.

        To be called once no process works on a unit any more.
        """
        folder = storage.join(self.url, "attempts")
        for name in storage.list_files(folder):
            unit = int(name.removesuffix(".json"))
            place, count = self._attempt_place(unit), self.attempts(unit) - 1
            if count > 0:
                storage.write_atomic(
                    place, json.dumps({**json.loads(storage.read_bytes(place)), "count": count}).encode()
                )
            else:
                storage.remove(place)

    def clear_attempts(self, units: Iterable[int]) -> None:
        """Remove the markers of units that are to be tried again from the start."""
        for unit in units:
            self.end_attempt(unit)

    def _attempt_place(self, unit: int) -> str:
        return storage.join(self.url, "attempts", f"{unit:09d}.json")


def _remove(place: str) -> None:
    """Remove a file durably."""
    storage.remove(place)
    _sync_folder(place)


def _sync_folder(place: str) -> None:
    if storage.is_local(place):
        with suppress(FileNotFoundError):
            storage.sync_file(place.rpartition("/")[0])


def _batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """Items in lists of ``count``, the last one shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, count)):
        yield batch

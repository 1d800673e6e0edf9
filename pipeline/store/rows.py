"""Which rows of a store hold a good sample: of a complete store by its index, else by its receipts.

Needs neither the plan nor a request for each unit.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DamagedReceiptError, StoreError
from pipeline.inputs import storage
from pipeline.store.layout import OK, Layout, require_complete
from pipeline.store.parquet import read_columns
from pipeline.store.partitions import equals, partition_place
from pipeline.store.segments import UNITS_PER_SEGMENT, list_done, receipt_place, segment_statuses, segment_units

__all__ = ["good_rows", "read_all"]

T = TypeVar("T")
Rows = NDArray[np.int64]
_THREADS = 16


def good_rows(out: str, attributes: Mapping[str, Any], partial: bool = False) -> Rows:
    """Rows that hold a good sample, sorted.

    No thread outlives the call, so that the process may fork afterwards where the store is local.

    Args:
        out: the store.
        attributes: of the store.
        partial: serve a store that is not complete: the rows whose receipts are there.

    Raises:
        IncompleteStoreError: the store is not complete.
        StoreError: its index or its receipts are damaged, or a part of them is missing.
    """
    layout = Layout.from_dict(attributes["layout"])
    if not partial:
        require_complete(out, attributes)
    rows = _indexed(out, layout) if attributes.get("complete") else _committed(out, layout)
    return np.concatenate([np.zeros(0, np.int64), *rows])


def _indexed(out: str, layout: Layout) -> list[Rows]:
    def read(number: int) -> Rows:
        place = partition_place(out, number)
        try:
            table = read_columns(place, ["row", "status"])
        except FileNotFoundError as error:
            raise StoreError(
                f"{place} is missing, and {out} is complete: the file was removed; run the job that made the store "
                "again, which writes it anew"
            ) from error
        return np.asarray(table["row"].to_numpy()[equals(table["status"], "ok")], np.int64)

    partitions = range(-(-layout.rows // layout.rows_per_shard // UNITS_PER_SEGMENT))
    return read_all(out, read, partitions)


def _committed(out: str, layout: Layout) -> list[Rows]:
    ledger = storage.join(out, "ledger")

    def of_segment(number: int) -> Rows:
        counts, statuses = segment_statuses(ledger, number)
        firsts = np.array(segment_units(number), np.int64) * layout.rows_per_shard
        # Position of each sample in its unit: its number less that of the unit's first sample.
        offsets = np.arange(len(statuses)) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray((np.repeat(firsts, counts) + offsets)[statuses == OK], np.int64)

    def of_receipt(unit: int) -> Rows:
        place = receipt_place(ledger, unit)
        data = storage.read_bytes(place)
        try:
            samples = json.loads(data)["samples"]
            return np.array([one["row"] for one in samples if one["status"] == "ok"], np.int64)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedReceiptError(
                unit,
                f"{place} is no receipt ({type(error).__name__}: {error}): it is damaged; verify the store with "
                "--repair, then run the job again",
            ) from error

    done = list_done(ledger)
    rows = read_all(out, of_segment, done.segments.tolist()) + read_all(out, of_receipt, done.open.tolist())
    return [np.sort(np.concatenate([np.zeros(0, np.int64), *rows]))]


def read_all(out: str, read: Callable[[int], T], numbers: Iterable[int]) -> list[T]:
    """``read`` of all numbers; of remote files by several threads, which end with the call."""
    if storage.is_local(out):
        return list(map(read, numbers))
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, numbers))

"""Stores, ledgers and receipts that tests of the store use."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey
from pipeline.store.ledger import Receipt, SampleRecord
from pipeline.store.segments import receipt_place

DIGEST = "0123456789abcdef" * 4


def key_of(unit: int, count: int = 2, rows: int = 4) -> UnitKey:
    return UnitKey(unit, 0, unit * rows, unit * rows + count, unit * rows)


def receipt_of(unit: int, count: int = 2, shard: str = DIGEST) -> Receipt:
    key = key_of(unit, count)
    return Receipt(key, shard, tuple(SampleRecord(f"k{n}", key.row + n, "ok") for n in range(count)))


def put_receipts(url: str, receipts: Iterable[Receipt]) -> None:
    """Open receipts, without the wait for the disk of each commit."""
    for receipt in receipts:
        place = receipt_place(url, receipt.unit.unit)
        if storage.is_local(url):
            path = Path(place)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(receipt.to_json())
        else:
            storage.write_atomic(place, receipt.to_json())

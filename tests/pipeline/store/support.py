"""Stores, ledgers and receipts that tests of the store use."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard, UnitKey
from pipeline.store.create import declare_complete
from pipeline.store.index import write_index
from pipeline.store.layout import OK
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
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


def plan_of(samples: int, rows: int = 4) -> Plan:
    """A plan of one input shard."""
    return Plan((PlannedShard("a.tar", 1, "", samples, samples, (), DIGEST),), rows, "")


def commit_statuses(url: str, plan: Plan, statuses: Sequence[Sequence[int]]) -> None:
    """Receipts of a store's first units, from the status of their samples."""
    for number, unit in enumerate(statuses):
        key = plan.unit(number)
        records = tuple(
            SampleRecord(f"k{key.row + place}", key.row + place, "ok" if status == OK else "failed")
            for place, status in enumerate(unit)
        )
        Ledger(storage.join(url, "ledger")).commit(Receipt(key, DIGEST, records))


def finish_store(url: str, statuses: Sequence[Sequence[int]], rows: int = 4) -> None:
    """What a job does last with a store whose arrays are written: receipts, index, and the mark that it is complete."""
    plan = plan_of(sum(map(len, statuses)), rows)
    commit_statuses(url, plan, statuses)
    write_index(url, plan, Ledger(storage.join(url, "ledger")), {})
    declare_complete(url)

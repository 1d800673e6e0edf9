"""A store at one moment: which units are done, failed, begun or left, and what became of their samples. Only reads."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.inputs.manifest import shard_name
from pipeline.inputs.plan import Plan
from pipeline.store.layout import FAILED, OK, read_attributes
from pipeline.store.lease import holder
from pipeline.store.ledger import Ledger
from pipeline.store.parquet import read_columns
from pipeline.store.partitions import equals, list_partitions, partition_place, read_facts
from pipeline.store.receipt import Receipt
from pipeline.store.segments import UNITS_PER_SEGMENT, open_segment, segment_statuses, segment_units

__all__ = ["FailedSample", "StoreSnapshot", "UnitStatus"]

T = TypeVar("T")
V = TypeVar("V")
_THREADS = 16


@dataclass(frozen=True)
class UnitStatus:
    """One unit of work.

    ``state`` is ``done``, ``failed`` (for good, in the last run that ended), ``begun``, ``left``, or ``damaged`` (its
    receipt is). ``seconds`` per stage, ``worker`` and ``finished`` (seconds since 1970) are those of its receipt.
    """

    unit: int
    state: str
    samples: int
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    worker: dict[str, Any] = field(default_factory=dict)
    finished: float | None = None

    @property
    def total_seconds(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @staticmethod
    def of(receipt: Receipt) -> "UnitStatus":
        """That of a unit with a receipt."""
        reasons = Counter(record.reason for record in receipt.samples if record.status != "ok")
        return UnitStatus(
            receipt.unit.unit,
            "done",
            len(receipt.samples),
            reasons.total(),
            dict(reasons),
            receipt.seconds,
            receipt.worker,
            receipt.worker.get("finished"),
        )


@dataclass(frozen=True)
class FailedSample:
    """One sample that failed, and why. ``shard`` is the URL of its input shard."""

    key: str
    shard: str
    unit: int
    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class SegmentCounts:
    """Samples of a segment by status, and its units with failed ones; nothing, and the ``error``, of a damaged one."""

    ok: int = 0
    failed: int = 0
    units_with_failures: tuple[int, ...] = ()
    error: str = ""


class StoreSnapshot:
    """What there was of a store when it was made.

    Attributes:
        lease: who holds it.
        attributes: of the store, ``None`` where none was created.
        plan: of all units, ``None`` where none was written.
        done: the units with a receipt.
        begun: units with a mark of an attempt that did not end (yet).
        facts: by number, what the index's partitions say, of those that stand.
        failed_units: by partition, the units without a receipt that the last run counted as failed for good.
    """

    def __init__(self, url: str) -> None:
        """
        Raises:
            StoreError: there is something else, or a store of a format that this program does not read.
        """
        self.url = url
        # The lease first: a job that ends in between then shows as complete.
        self.lease = holder(url)
        self.ledger = Ledger(storage.join(url, "ledger"))
        self.done = self.ledger.done()
        self.attributes = read_attributes(url)
        self.plan = _read_plan(url)
        self.complete = bool(self.attributes and self.attributes.get("complete"))
        names = storage.list_files(storage.join(url, "ledger", "attempts"))
        numbers = (name.removesuffix(".json") for name in names)
        self.begun = {int(number) for number in numbers if number.isdigit()} - self.done
        segments = set(self.done.segments.tolist())
        present = list_partitions(url).tolist()
        facts = dict(zip(present, _map(lambda number: read_facts(url, number), present), strict=True))
        self.facts = {
            number: one
            for number, one in facts.items()
            if one is not None and (self.complete or (one.sealed and number in segments))
        }
        self.failed_units = {
            number: failed
            for number, one in facts.items()
            if one is not None and (failed := [unit for unit in one.failed_units if unit not in self.done])
        }

    @property
    def uncovered_segments(self) -> list[int]:
        """Segments that the index does not cover yet."""
        return [number for number in self.done.segments.tolist() if number not in self.facts]

    @property
    def uncovered_open(self) -> list[int]:
        """Units with an open receipt that the index does not cover yet."""
        return [unit for unit in self.done.open.tolist() if unit // UNITS_PER_SEGMENT not in self.facts]

    def segment_counts(self) -> dict[int, SegmentCounts]:
        """By number, the segments that the index does not cover yet."""
        numbers = self.uncovered_segments
        return dict(zip(numbers, _map(self._segment_counts, numbers), strict=True))

    def _segment_counts(self, number: int) -> SegmentCounts:
        try:
            samples, statuses = segment_statuses(self.ledger.url, number)
        except FileNotFoundError:  # its units were set back since
            return SegmentCounts()
        except StoreError as error:
            return SegmentCounts(error=str(error))
        failed = statuses == FAILED
        units = np.repeat(np.array(segment_units(number)), samples)[failed]
        return SegmentCounts(int((statuses == OK).sum()), int(failed.sum()), tuple(np.unique(units).tolist()))

    def open_receipts(self, units: Iterable[int]) -> Iterator[tuple[int, Receipt | StoreError | None]]:
        """(unit, its receipt) of units that are not compacted, in this order.

        Where the receipt is damaged or another store's, the error; ``None`` where it was taken back since.
        """
        plan = self._plan()

        def read(unit: int) -> Receipt | StoreError | None:
            key = plan.unit(unit)
            try:
                return self.ledger.get(key, plan.shards[key.shard].digest)
            except StoreError as error:
                return error

        known = [unit for unit in units if unit < plan.units]
        for start in range(0, len(known), 64 * _THREADS):
            batch = known[start : start + 64 * _THREADS]
            yield from zip(batch, _map(read, batch), strict=True)

    def segment_receipts(
        self, number: int, units: Iterable[int] | None = None
    ) -> Iterator[tuple[int, Receipt | StoreError | None]]:
        """As :meth:`open_receipts`, of units of one segment; by default of all."""
        segment = open_segment(self.ledger.url, number)
        for unit in segment_units(number) if units is None else units:
            if segment is None:
                yield unit, None
                continue
            try:
                yield unit, Receipt.from_json(segment.receipt(unit))
            except (StoreError, ValueError, KeyError, TypeError) as error:
                yield unit, error if isinstance(error, StoreError) else StoreError(f"{segment.place}: {error}")

    def units(self) -> Iterator[UnitStatus]:
        """All units of the plan, in order. Reads every receipt."""
        plan = self._plan()
        segments = set(self.done.segments.tolist())
        for number in range(-(-plan.units // UNITS_PER_SEGMENT)):
            failed = set(self.failed_units.get(number, ()))
            numbers = [unit for unit in segment_units(number) if unit < plan.units]
            receipts = dict(
                self.segment_receipts(number)
                if number in segments
                else self.open_receipts(unit for unit in numbers if unit in self.done)
            )
            for unit in numbers:
                receipt, samples = receipts.get(unit), len(plan.unit(unit))
                if isinstance(receipt, Receipt):
                    yield UnitStatus.of(receipt)
                elif receipt is not None:
                    yield UnitStatus(unit, "damaged", samples)
                elif unit in failed:
                    yield UnitStatus(unit, "failed", samples, samples)
                else:
                    yield UnitStatus(unit, "begun" if unit in self.begun else "left", samples)

    def failed_samples(self) -> Iterator[FailedSample]:
        """The samples that failed so far, in the order of rows, those of units that failed for good included."""
        if self.plan is None:
            return
        segments = set(self.done.segments.tolist())
        open_units: dict[int, list[int]] = {}
        for unit in self.uncovered_open:
            open_units.setdefault(unit // UNITS_PER_SEGMENT, []).append(unit)
        for number in sorted({*self.facts, *segments, *open_units, *self.failed_units}):
            if number in self.facts:
                if self.facts[number].failed:
                    yield from self._indexed_failures(number)
                continue
            receipts = (
                self.segment_receipts(number, self._segment_counts(number).units_with_failures)
                if number in segments
                else self.open_receipts(open_units.get(number, ()))
            )
            found = [
                sample for _, receipt in receipts if isinstance(receipt, Receipt) for sample in self._failures(receipt)
            ]
            if number in self.failed_units:
                found += self._indexed_failures(number, set(self.failed_units[number]))
            yield from sorted(found, key=lambda sample: sample.row)

    def _failures(self, receipt: Receipt) -> Iterator[FailedSample]:
        shard = shard_name(self._plan().shards[receipt.unit.shard].url)
        for record in receipt.samples:
            if record.status != "ok":
                yield FailedSample(record.key, shard, receipt.unit.unit, record.row, record.reason, record.detail)

    def _indexed_failures(self, number: int, units: set[int] | None = None) -> list[FailedSample]:
        names = ["key", "shard", "unit", "row", "reason", "detail"]
        table = read_columns(partition_place(self.url, number), ["status", *names])
        chosen = ~equals(table["status"], "ok")
        if units is not None:
            chosen &= np.isin(table["unit"].to_numpy(), list(units))
        return [FailedSample(**row) for row in table.take(np.flatnonzero(chosen)).select(names).to_pylist()]

    def uncovered_lost_samples(self) -> list[FailedSample]:
        """The samples of the units that failed for good and that no partition that stands covers."""
        numbers = self.failed_units.keys() - self.facts.keys()
        return [
            sample for number in numbers for sample in self._indexed_failures(number, set(self.failed_units[number]))
        ]

    def _plan(self) -> Plan:
        if self.plan is None:
            raise StoreError(f"{self.url} has no plan/plan.json: no job has planned it yet, or the file was removed")
        return self.plan


def _read_plan(url: str) -> Plan | None:
    try:
        return Plan.from_json(
            storage.read_bytes(storage.join(url, "plan", "plan.json")), storage.join(url, "plan", "index")
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{url}: plan/plan.json is no plan ({type(error).__name__}: {error}); restore it") from error


def _map(read: Callable[[T], V], items: list[T]) -> list[V]:
    """``read`` of all items by several threads, which end with the call."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, items))

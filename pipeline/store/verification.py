"""Verification of a store as a whole: its plan, its index and its files, and the report of all units' findings."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pipeline.console import human_bytes
from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.store.create import withdraw_complete
from pipeline.store.index import partition_count
from pipeline.store.layout import Layout, store_attributes
from pipeline.store.ledger import Ledger
from pipeline.store.partitions import list_partitions, partition_place, read_facts
from pipeline.store.provenance import check_plan_files
from pipeline.store.segments import UNITS_PER_SEGMENT, DoneUnits, segment_units
from pipeline.store.verify import Finding

__all__ = ["Verification", "find_plan", "repair_store", "stored_plan", "verify_store"]

_NAMED = 10


@dataclass
class Verification:
    """What a verification found in all: ``clean`` if nothing is wrong."""

    units: int
    samples: int
    ok: int = 0
    failed: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    misindexed: set[int] = field(default_factory=set)
    compared: int = 0
    unreadable: list[str] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Count one unit."""
        self.ok += finding.ok
        self.failed += finding.failed
        self.bytes += finding.bytes
        self.problems += finding.problems
        self.compared += finding.compared
        if finding.missing:
            self.missing.append(finding.unit)
        if finding.damaged:
            self.damaged.append(finding.unit)
        if finding.misindexed:
            self.misindexed.add(finding.unit // UNITS_PER_SEGMENT)
        if finding.unreadable:
            self.unreadable.append(finding.unreadable)

    @property
    def clean(self) -> bool:
        """Whether the store is whole."""
        return not self.problems and not self.missing and self.ok + self.failed == self.samples

    def text(self) -> str:
        """The report."""
        lines = self.problems[:100]
        if len(self.problems) > len(lines):
            lines.append(f"... and {len(self.problems) - len(lines)} more")
        if self.missing:
            lines.append(
                f"{len(self.missing)} of {self.units} units have no receipt: {_named(sorted(self.missing))}; run the "
                "job again to finish the store"
            )
        if self.unreadable:
            lines.append(
                f"input not at hand: labels of {len(self.unreadable)} units not compared ({self.unreadable[0]})"
            )
        lines += self.notes
        state = "clean" if self.clean else f"{len(self.problems) + bool(self.missing)} problems"
        lines.append(
            f"{state}: {self.units} units, {self.samples} samples = {self.ok} ok + {self.failed} failed, "
            f"{human_bytes(self.bytes)} read, labels of {self.compared} units compared with the input"
        )
        return "\n".join(lines)


def _named(units: list[int]) -> str:
    return ", ".join(map(str, units[:_NAMED])) + (" ..." if len(units) > _NAMED else "")


def find_plan(out: str) -> Plan | None:
    """The plan that a store was begun by; ``None`` where there is none yet.

    Raises:
        StoreError: the plan is damaged.
    """
    place = storage.join(out, "plan", "plan.json")
    try:
        return Plan.from_json(storage.read_bytes(place), storage.join(out, "plan", "index"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{place} is damaged ({type(error).__name__}: {error}); restore it") from error


def stored_plan(out: str) -> Plan:
    """The plan of a store.

    Raises:
        StoreError: there is no store, or its plan is missing or damaged.
    """
    store_attributes(out)
    plan = find_plan(out)
    if plan is None:
        raise StoreError(f"no feature store at {out} (plan/plan.json is missing); give the folder that was --out")
    return plan


def verify_store(out: str, plan: Plan, done: DoneUnits, report: Verification) -> frozenset[int]:
    """Check what no unit tells: attributes, plan, files of the plan, and the index as a whole.

    Args:
        out: the store.
        plan: its plan.
        done: its units with a receipt.
        report: gets the problems, and the units without a receipt.

    Returns:
        Partitions of the index whose rows are to be held against the receipts.
    """
    attributes = store_attributes(out)
    report.missing += done.todo(plan.units).tolist()
    report.problems += check_plan_files(out)
    layout = Layout.from_dict(attributes["layout"])
    if (layout.rows, layout.rows_per_shard) != (plan.rows, plan.rows_per_shard):
        report.problems.append(
            f"the arrays have {layout.rows} rows in shards of {layout.rows_per_shard}, plan/plan.json {plan.rows} in "
            f"shards of {plan.rows_per_shard}: it is not the plan the store was made with, or the job was cut short "
            "while the store grew; run the job again"
        )
    beyond = len(done) - int(done.mask(plan.units).sum())
    if beyond:
        report.problems.append(f"the ledger has receipts of {beyond} units beyond the plan's {plan.units}")
    if not attributes.get("complete"):
        report.problems.append(
            "not complete: the job has not ended, and the index was not compared; run the job again to finish the store"
        )
        return frozenset()
    return _verify_partitions(out, plan, report)


def _verify_partitions(out: str, plan: Plan, report: Verification) -> frozenset[int]:
    count = partition_count(plan.units)
    present = list_partitions(out).tolist()
    report.problems += [
        f"{partition_place(out, number)} is a part of the index beyond the plan's {plan.units} units"
        for number in present
        if number >= count
    ]
    report.misindexed.update(number for number in present if number >= count)
    sound = []
    with ThreadPoolExecutor(16) as pool:
        for number, facts in enumerate(pool.map(lambda number: read_facts(out, number), range(count))):
            units = segment_units(number)
            samples = sum(len(plan.unit(unit)) for unit in range(units.start, min(units.stop, plan.units)))
            if facts is not None and facts.samples == samples:
                sound.append(number)
                continue
            state = (
                "is missing or damaged" if facts is None else f"has {facts.samples} rows, the plan {samples} samples"
            )
            report.problems.append(f"{partition_place(out, number)} {state}")
            report.misindexed.add(number)
    return frozenset(sound)


def repair_store(out: str, report: Verification) -> None:
    """Set damaged units back, so that the next run computes them anew, and parts of the index that are wrong.

    The store is not complete from then on, until the job has run again; the report says so, and how.
    """
    if not report.damaged and not report.misindexed:
        report.notes.append("nothing to repair")
        return
    withdraw_complete(out)
    units = Ledger(storage.join(out, "ledger")).reopen(report.damaged)
    for number in sorted(report.misindexed):
        storage.remove(partition_place(out, number))
    # What a damaged segment takes with it.
    neighbours = np.setdiff1d(units, report.damaged).tolist()
    config = storage.join(out, "plan", "config.yaml")
    report.notes.append(
        f"repair: {len(units)} units set back ({_named(units) or 'none'})"
        + (f", {len(neighbours)} of them because their receipts were damaged as well" if neighbours else "")
        + f", {len(report.misindexed)} parts of the index removed. The store is not complete until the job has run "
        f"again: python -m jobs.precompute --config {config}"
    )

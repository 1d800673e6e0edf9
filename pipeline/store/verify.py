"""Verification: everything a store holds, read again and held against its receipts, its plan and its input."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np

from pipeline.console import human_bytes
from pipeline.errors import PipelineError, StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.store.index import read_index
from pipeline.store.layout import FAILED, NOTHING, OK, AnyArray, open_arrays, read_attributes, stored_layout
from pipeline.store.ledger import Ledger, Receipt
from pipeline.store.writer import row_checksum

__all__ = ["Finding", "Verification", "verify_index", "verify_unit"]


SourceCheck: TypeAlias = Callable[[str, Plan, UnitKey, Receipt, Mapping[str, AnyArray]], Iterable[str]]
"""What differs between a unit of a store and its input: (store, plan, unit, receipt, arrays) -> findings."""


@dataclass(frozen=True)
class Finding:
    """What was found of one unit: how many good rows and bytes were read, and what is wrong (nothing, if empty)."""

    unit: int
    ok: int
    failed: int
    bytes: int
    problems: tuple[str, ...]

    def to_row(self) -> dict[str, Any]:
        """As a row of plain values."""
        return {**asdict(self), "problems": json.dumps(self.problems)}

    @staticmethod
    def from_row(row: dict[str, Any]) -> "Finding":
        """What :meth:`to_row` made."""
        return Finding(**{**row, "problems": tuple(json.loads(row["problems"]))})


@dataclass
class Verification:
    """What a verification found in all: ``clean`` if nothing is wrong."""

    units: int
    samples: int
    ok: int = 0
    failed: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Count one unit."""
        self.ok += finding.ok
        self.failed += finding.failed
        self.bytes += finding.bytes
        self.problems += finding.problems

    @property
    def clean(self) -> bool:
        """Whether the store is whole."""
        return not self.problems and self.ok + self.failed == self.samples

    def text(self) -> str:
        """The report."""
        lines = self.problems[:100]
        if len(self.problems) > len(lines):
            lines.append(f"... and {len(self.problems) - len(lines)} more")
        state = "clean" if self.clean else f"{len(self.problems)} problems"
        lines.append(
            f"{state}: {self.units} units, {self.samples} samples = {self.ok} ok + {self.failed} failed, "
            f"{human_bytes(self.bytes)} read"
        )
        return "\n".join(lines)


def verify_unit(out: str, plan: Plan, number: int, check_source: SourceCheck | None = None) -> Finding:
    """Read one unit's rows of every array and compare them with its receipt.

    Checked are the chunks' own checksums (by reading them), the checksum of every row as it was before encoding, the
    status array, that failed rows and holes hold nothing, and the labels' rows against the features' rows.

    Args:
        check_source: also compares the unit with its input, and says what differs.
    """
    key = plan.unit(number)
    try:
        receipt = Ledger(storage.join(out, "ledger")).get(key, plan.shards[key.shard].digest)
    except (PipelineError, ValueError) as error:
        return Finding(number, 0, 0, 0, (f"{key}: {error}",))
    if receipt is None:
        return Finding(number, 0, 0, 0, (f"{key}: no receipt; run the job again to finish the store",))
    problems: list[str] = []
    read = 0
    specs = stored_layout(out).arrays
    arrays = open_arrays(out, [spec.name for spec in specs], "zarrs")
    status = np.full(plan.rows_per_shard, NOTHING, np.uint8)
    for offset, record in enumerate(receipt.samples):
        status[offset] = OK if record.status == "ok" else FAILED
    for spec in specs:
        array = arrays[spec.name]
        try:
            block = np.asarray(array[key.row : key.row + plan.rows_per_shard])
        except Exception as error:  # noqa: BLE001 - whatever a damaged shard makes a codec raise is the finding
            problems.append(f"{key}: {spec.name} cannot be read: {type(error).__name__}: {error}")
            continue
        read += block.nbytes
        if spec.name == "status":
            if not np.array_equal(block, status):
                problems.append(f"{key}: status is {block.tolist()}, the receipt says {status.tolist()}")
            continue
        problems += _check_rows(spec.name, spec.fill, block, status, receipt)
    if check_source is not None:
        problems += check_source(out, plan, key, receipt, arrays)
    good = int((status == OK).sum())
    return Finding(number, good, len(receipt.samples) - good, read, tuple(problems))


def _check_rows(name: str, fill: float, block: np.ndarray, status: np.ndarray, receipt: Receipt) -> Iterator[str]:
    sums = receipt.checksums.get(name, [])
    for offset, row in enumerate(block):
        where = f"{name} row {receipt.unit.row + offset}"
        if status[offset] == OK:
            wanted = sums[offset] if offset < len(sums) else None
            found = row_checksum(row)
            if found != wanted:
                key = receipt.samples[offset].key
                yield f"{where} ({key}): crc32c {found}, the receipt says {wanted}; it changed since it was written"
        elif not (np.isnan(row).all() if np.isnan(fill) else (row == fill).all()):
            yield f"{where} holds data, and no good sample belongs there"


def verify_index(out: str, plan: Plan) -> list[str]:
    """Compare ``index.parquet`` with the plan: every sample once, in its row, counts as in the store's attributes."""
    table = read_index(out, ["row", "key", "unit", "status"])
    problems = []
    if len(table) != plan.samples:
        problems.append(f"index.parquet has {len(table)} rows, the plan {plan.samples} samples")
    rows = table["row"].to_numpy()
    expected = np.concatenate(
        [np.arange(key.row, key.row + len(key)) for key in map(plan.unit, range(plan.units))] or [np.zeros(0, int)]
    )
    if not np.array_equal(rows, expected):
        problems.append("the rows in index.parquet are not those of the plan")
    if (read_attributes(out) or {}).get("identity", {}).get("input digest") != plan.digest:
        raise StoreError(f"{out}: plan/plan.json is not the plan the store was made with; restore it")
    return problems

"""Verification of a unit: everything a store holds of it, read again and held against its receipt and its plan."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from pipeline.errors import DamagedReceiptError, EnvironmentFault, InputChangedError, InputError, PipelineError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.redaction import redact
from pipeline.store.index import index_table
from pipeline.store.layout import FAILED, NOTHING, OK, AnyArray, ArraySpec, open_arrays, stored_layout
from pipeline.store.ledger import Ledger, Receipt
from pipeline.store.outliers import FLAG
from pipeline.store.parquet import read_columns
from pipeline.store.partitions import INDEX_SCHEMA, partition_place
from pipeline.store.segments import UNITS_PER_SEGMENT
from pipeline.store.writer import row_checksum

__all__ = ["Finding", "SourceCheck", "verify_unit"]


SourceCheck: TypeAlias = Callable[[str, Plan, UnitKey, Receipt, Mapping[str, AnyArray]], Iterable[str]]
"""What differs between a unit of a store and its input: (store, plan, unit, receipt, arrays) -> problems.

Raises InputChangedError where the input is another one, InputError or OSError where it cannot be read.
"""
# Of a unit whose index differs everywhere, so many differences are named.
_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """What was found of one unit.

    Attributes:
        unit: its number.
        ok: good rows.
        failed: failed samples.
        bytes: read of the arrays.
        problems: what is wrong; nothing, if empty.
        damaged: whether its arrays or its receipt are, so that it must be computed anew.
        misindexed: whether the index says something else than its receipt.
        missing: whether it has no receipt.
        compared: whether its labels were held against the input.
        unreadable: why the input could not be read for that; empty where it could, or was not to be.
    """

    unit: int
    ok: int = 0
    failed: int = 0
    bytes: int = 0
    problems: tuple[str, ...] = ()
    damaged: bool = False
    misindexed: bool = False
    missing: bool = False
    compared: bool = False
    unreadable: str = ""

    def to_row(self) -> dict[str, Any]:
        """As a row of plain values."""
        return {**asdict(self), "problems": json.dumps(self.problems)}

    @staticmethod
    def from_row(row: dict[str, Any]) -> "Finding":
        """What :meth:`to_row` wrote."""
        return Finding(**{**row, "problems": tuple(json.loads(row["problems"]))})


def verify_unit(
    out: str, plan: Plan, number: int, check_source: SourceCheck | None = None, indexed: bool = True
) -> Finding:
    """Read one unit's rows of every array and compare them with its receipt, and that with the plan and the index.

    Checked are the chunks' own checksums (by reading them), the checksum of every row as it was before encoding, the
    status array, that failed rows and holes hold nothing, the receipt's samples against the plan's, and every column
    of the unit's rows in the index against the receipt.

    Args:
        out: the store.
        plan: its plan.
        number: the unit.
        check_source: also compares the unit with its input, and says what differs.
        indexed: whether its partition of the index is there to be compared.
    """
    key = plan.unit(number)
    try:
        receipt = Ledger(storage.join(out, "ledger")).get(key, plan.shards[key.shard].digest)
    except (PipelineError, OSError) as error:
        damaged = isinstance(error, DamagedReceiptError)
        return Finding(number, problems=(redact(f"{key}: {error}"),), damaged=damaged)
    if receipt is None:
        return Finding(number, missing=True)
    status = np.full(plan.rows_per_shard, NOTHING, np.uint8)
    status[: len(receipt.samples)] = [OK if record.status == "ok" else FAILED for record in receipt.samples]
    specs = stored_layout(out).arrays
    arrays = open_arrays(out, [spec.name for spec in specs], "zarrs")
    damages: list[str] = []
    input_problems: list[str] = []
    try:
        damages += _check_plan(plan, receipt)
    except (InputError, OSError) as error:
        input_problems.append(f"{key}: the plan's samples cannot be read: {error}")
    read = 0
    for spec in specs:
        size, found = _check_array(spec, arrays[spec.name], status, receipt)
        read += size
        damages += found
    index_problems = list(_check_index(out, plan, receipt)) if indexed else []
    unreadable = ""
    if check_source is not None:
        try:
            damages += check_source(out, plan, key, receipt, arrays)
        except InputChangedError as error:
            input_problems.append(f"{key}: {error}")
        except (InputError, EnvironmentFault, OSError) as error:
            unreadable = redact(str(error))
    good = int((status == OK).sum())
    return Finding(
        unit=number,
        ok=good,
        failed=len(receipt.samples) - good,
        bytes=read,
        problems=tuple(map(redact, (*damages, *index_problems, *input_problems))),
        damaged=bool(damages),
        misindexed=bool(index_problems),
        compared=check_source is not None and not unreadable,
        unreadable=unreadable,
    )


def _check_array(spec: ArraySpec, array: AnyArray, status: np.ndarray, receipt: Receipt) -> tuple[int, list[str]]:
    """(bytes read, problems) of one array's rows of a unit."""
    key = receipt.unit
    try:
        block = np.asarray(array[key.row : key.row + len(status)])
    except Exception as error:  # noqa: BLE001 - whatever a damaged shard makes a codec raise is the finding
        return 0, [f"{key}: {spec.name} cannot be read: {type(error).__name__}: {error}"]
    if spec.name != "status":
        return block.nbytes, list(_check_rows(spec.name, spec.fill, block, status, receipt))
    if np.array_equal(block, status):
        return block.nbytes, []
    return block.nbytes, [f"{key}: status is {block.tolist()}, the receipt says {status.tolist()}"]


def _check_rows(name: str, fill: float, block: np.ndarray, status: np.ndarray, receipt: Receipt) -> Iterator[str]:
    sums = receipt.checksums.get(name, [])
    for offset, row in enumerate(block):
        where = f"{name} row {receipt.unit.row + offset}"
        if status[offset] == OK:
            recorded = sums[offset] if offset < len(sums) else None
            checksum = row_checksum(row)
            if checksum != recorded:
                key = receipt.samples[offset].key
                yield f"{where} ({key}): crc32c {checksum}, the receipt says {recorded}; it changed since then"
        elif not (np.isnan(row).all() if np.isnan(fill) else (row == fill).all()):
            yield f"{where} holds data, and no good sample belongs there"


def _check_plan(plan: Plan, receipt: Receipt) -> Iterator[str]:
    """Whether a receipt lists the samples that the plan has, in their rows."""
    key = receipt.unit
    planned = [(sample.key, key.row + offset) for offset, sample in enumerate(plan.unit_samples(key))]
    recorded = [(record.key, record.row) for record in receipt.samples]
    if len(recorded) != len(planned):
        yield f"{key}: the receipt lists {len(recorded)} samples, the plan {len(planned)}"
        return
    for (name, row), (planned_name, planned_row) in zip(recorded, planned, strict=True):
        if (name, row) != (planned_name, planned_row):
            yield f"{key}: the receipt lists {name} in row {row}, the plan {planned_name} in row {planned_row}"
            return


def _check_index(out: str, plan: Plan, receipt: Receipt) -> Iterator[str]:
    """Every column of a unit's rows in the index that is not what follows from its receipt."""
    key = receipt.unit
    place = partition_place(out, key.unit // UNITS_PER_SEGMENT)
    try:
        state = storage.stat(place)
        partition = _partition(place, state.size, state.stamp)
    except (PipelineError, OSError) as error:
        yield f"{key}: its part of the index cannot be read: {error}"
        return
    rows = partition["row"].to_numpy()
    start = int(np.searchsorted(rows, key.row))
    stop = int(np.searchsorted(rows, key.row + plan.rows_per_shard))
    indexed = partition.slice(start, stop - start).to_pylist()
    expected = index_table([receipt], plan).to_pylist()
    if len(indexed) != len(expected):
        yield f"{key}: the index has {len(indexed)} rows of it, the receipt {len(expected)} samples"
        return
    differences = [
        f"index row {wanted['row']} ({wanted['key']}): {name} is {has[name]!r}, the receipt says {wanted[name]!r}"
        for has, wanted in zip(indexed, expected, strict=True)
        for name in INDEX_SCHEMA.names
        if not _same(name, has[name], wanted[name])
    ]
    yield from differences[:_NAMED]
    if len(differences) > _NAMED:
        yield f"{key}: and {len(differences) - _NAMED} more differences between its index and its receipt"


def _same(column: str, indexed: Any, expected: Any) -> bool:
    if column == "flags":
        # The index compares fits with each other; a receipt knows its own only.
        indexed = " ".join(flag for flag in indexed.split() if flag != FLAG)
    return bool(indexed == expected or (indexed != indexed and expected != expected))


@lru_cache(maxsize=2)
def _partition(place: str, size: int, stamp: str) -> pa.Table:
    """A partition of the index, read once in each process as long as the file is the same."""
    return read_columns(place)

"""The index of a store: a row for every sample, in a parquet file for each thousand units, and the summary of a run."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.console import human_bytes
from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.inputs.manifest import shard_name
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.inputs.tar import describe_ignored
from pipeline.redaction import redact
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
from pipeline.store.outliers import flag_outliers
from pipeline.store.parquet import read_columns
from pipeline.store.partitions import (
    INDEX_SCHEMA,
    ROWS_PER_GROUP,
    PartitionFacts,
    list_partitions,
    partition_place,
    read_facts,
    write_partition,
)
from pipeline.store.segments import UNITS_PER_SEGMENT, DoneUnits, segment_units

__all__ = ["Summary", "index_table", "partition_count", "plan_digest", "read_index", "write_index"]

_THREADS = 16


@dataclass
class Summary:
    """What became of every sample: ``samples == ok + failed``."""

    units: int = 0
    samples: int = 0
    ok: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    ignored: str = ""
    failed_units: list[int] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, facts: PartitionFacts) -> None:
        """Count the units of one partition."""
        self.samples += facts.samples
        self.ok += facts.ok
        self.failed += facts.failed
        self.reasons.update(facts.reasons)
        self.failed_units += facts.failed_units
        self.seconds.update(facts.seconds)
        self.bytes.update(facts.bytes)

    def text(self) -> str:
        """The summary, for the end of a run."""
        lines = []
        if self.ok:
            lines.append(
                "per sample: " + ", ".join(f"{k} {1000 * v / self.ok:.1f} ms" for k, v in self.seconds.items())
            )
            lines.append(
                f"bytes: {human_bytes(self.bytes['read'])} read, {human_bytes(self.bytes['encode_write'])} of arrays, "
                f"{human_bytes(self.bytes['stored'])} stored"
            )
        lines += [f"input fault: {fault}" for fault in self.faults]
        if self.ignored:
            lines.append(f"ignored by rule: {self.ignored}")
        lines += [f"failed: {count:6d}  {reason}" for reason, count in self.reasons.most_common()]
        if self.failed_units:
            lines.append(f"units failed for good: {len(self.failed_units)} of {self.units}")
        lines.append(f"input {self.samples} = ok {self.ok} + failed {self.failed}")
        return "\n".join(lines)


def partition_count(units: int) -> int:
    """How many partitions the index of so many units has."""
    return -(-units // UNITS_PER_SEGMENT)


def write_index(out: str, plan: Plan, ledger: Ledger, failures: Mapping[int, Receipt]) -> Summary:
    """Bring ``OUT/index`` up to date with the receipts.

    A partition whose units lie in a segment is written once, and read again only for its sums.

    Args:
        out: the store.
        plan: all of its units.
        ledger: its receipts.
        failures: records of the units that failed in this run, by number.

    Raises:
        StoreError: a unit has neither a receipt nor a record of its failure, or its receipt lists other samples than
            the plan.
        DamagedReceiptError: a receipt is damaged.
    """
    done = ledger.done()
    _require_all(plan, done, failures)
    count = partition_count(plan.units)
    present = list_partitions(out)
    for number in present[present >= count].tolist():
        storage.remove(partition_place(out, number))
    segments, standing = set(done.segments.tolist()), set(present.tolist())

    def partition(number: int) -> PartitionFacts | None:
        known = read_facts(out, number) if number in segments and number in standing else None
        stands = known is not None and known.sealed and known.plan == plan_digest(plan, number)
        return known if stands else None

    with ThreadPoolExecutor(_THREADS) as pool:
        known = list(pool.map(partition, range(count)))
    facts = [
        one if one is not None else _write(out, plan, ledger, failures, number, number in segments)
        for number, one in enumerate(known)
    ]
    flag_outliers(out, facts)
    summary = Summary(units=plan.units, faults=[redact(fault) for fault in plan.faults])
    summary.ignored = describe_ignored(plan.ignored)
    for one in facts:
        summary.add(one)
    if summary.samples != plan.samples or summary.samples != summary.ok + summary.failed:
        raise StoreError(
            f"{plan.samples} samples planned, {summary.samples} accounted for as {summary.ok} ok and "
            f"{summary.failed} failed; this is a fault of the program"
        )
    return summary


def _require_all(plan: Plan, done: DoneUnits, failures: Mapping[int, Receipt]) -> None:
    """Refuse an index that lacks units, before any of its files changes."""
    missing = [unit for unit in done.todo(plan.units).tolist() if unit not in failures]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise StoreError(
            f"{plan.unit(missing[0])}{more} has no receipt, so not every sample is accounted for; run the job again"
        )


def _keys(plan: Plan, number: int) -> list[UnitKey]:
    units = segment_units(number)
    return [plan.unit(unit) for unit in range(units.start, min(units.stop, plan.units))]


def plan_digest(plan: Plan, number: int) -> str:
    """Identity of the part of a plan that a partition covers: units, input shards, and their URLs as in the index."""
    units = segment_units(number)
    first, last = plan.unit(units.start), plan.unit(min(units.stop, plan.units) - 1)
    shards = plan.shards[first.shard : last.shard + 1]
    content = [plan.rows_per_shard, first.start, last.stop, [[one.digest, shard_name(one.url)] for one in shards]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _write(
    out: str, plan: Plan, ledger: Ledger, failures: Mapping[int, Receipt], number: int, sealed: bool
) -> PartitionFacts:
    facts = PartitionFacts(plan=plan_digest(plan, number), sealed=sealed)
    seconds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def receipts() -> Iterator[Receipt]:
        pairs = ((key, plan.shards[key.shard].digest) for key in _keys(plan, number))
        for key, stored in ledger.receipts(pairs):
            receipt = stored or failures.get(key.unit)
            if receipt is None or len(receipt.samples) != len(key):
                counted = "no receipt" if receipt is None else f"{len(receipt.samples)} samples in its receipt"
                raise StoreError(f"{key} has {counted}, so not every sample is accounted for; run the job again")
            if stored is None:
                facts.failed_units.append(key.unit)
            seconds.update(receipt.seconds)
            sizes.update(receipt.sizes)
            yield receipt
        facts.seconds, facts.bytes = dict(seconds), dict(sizes)

    def tables() -> Iterator[pa.Table]:
        for batch in _pieces(receipts()):
            table = index_table(batch, plan)
            facts.count(table)
            yield table

    write_partition(out, number, tables(), facts)
    return facts


def _pieces(receipts: Iterable[Receipt]) -> Iterator[list[Receipt]]:
    """Receipts in lists of about a row group's samples, so that no more are in memory at once."""
    batch: list[Receipt] = []
    samples = 0
    for receipt in receipts:
        batch.append(receipt)
        samples += len(receipt.samples)
        if samples >= ROWS_PER_GROUP:
            yield batch
            batch, samples = [], 0
    if batch:
        yield batch


# A sample's values for the columns of the index, but for those that its unit decides.
_COLUMNS: dict[str, Callable[[SampleRecord], object]] = {
    "row": lambda record: record.row,
    "status": lambda record: record.status,
    "key": lambda record: record.key,
    "reason": lambda record: record.reason,
    "detail": lambda record: record.detail,
    "height": lambda record: record.source_size and record.source_size[0],
    "width": lambda record: record.source_size and record.source_size[1],
    "transform": lambda record: json.dumps(record.transform) if record.transform else "",
    "flags": lambda record: " ".join(record.flags),
    "orientation": lambda record: record.orientation,
    "decoder": lambda record: record.decoder,
    "sha256": lambda record: bytes.fromhex(record.sha256) or None,
    "label_sha256": lambda record: [(kind, bytes.fromhex(value)) for kind, value in record.label_sha256.items()],
    "explained_variance": lambda record: record.explained_variance,
}


def index_table(receipts: Sequence[Receipt], plan: Plan) -> pa.Table:
    """The rows of the index that follow from receipts, without the flags that compare images with each other."""
    records = [record for receipt in receipts for record in receipt.samples]
    counts = [len(receipt.samples) for receipt in receipts]
    urls = [shard_name(plan.shards[receipt.unit.shard].url) for receipt in receipts]
    names = sorted(set(urls))
    codes = np.repeat(np.array([names.index(url) for url in urls], np.int32), counts)
    columns = {
        "shard": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.string())),
        "unit": pa.array(np.repeat(np.array([receipt.unit.unit for receipt in receipts], np.int64), counts)),
        **{
            name: pa.array([value(record) for record in records], INDEX_SCHEMA.field(name).type)
            for name, value in _COLUMNS.items()
        },
    }
    return pa.Table.from_arrays([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)


def read_index(out: str, columns: Sequence[str] | None = None, units: Iterable[int] | None = None) -> pa.Table:
    """The index of a finished store as one table, in the order of rows.

    Args:
        out: the store.
        columns: only these.
        units: only the samples of these units; partitions of others are not read.

    Raises:
        StoreError: there is no index yet, or a part of it is missing or damaged.
    """
    present = list_partitions(out)
    if not len(present) or int(present[-1]) != len(present) - 1:
        state = f"partitions {present.tolist()[:10]} only" if len(present) else "no index"
        raise StoreError(
            f"{out} has {state}: the job that makes the store has not ended, or files of the index were removed; run "
            "the job to its end"
        )
    chosen = None if units is None else np.unique(np.fromiter(units, np.int64))
    numbers = present if chosen is None else np.intersect1d(chosen // UNITS_PER_SEGMENT, present)
    names = list(INDEX_SCHEMA.names if columns is None else columns)
    tables = []
    for number in numbers.tolist():
        table = read_columns(partition_place(out, number), [*names, "unit"] if chosen is not None else names)
        if chosen is not None:
            table = table.filter(pa.array(np.isin(table["unit"].to_numpy(), chosen))).select(names)
        tables.append(table)
    schema = pa.schema([INDEX_SCHEMA.field(name) for name in names])
    return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)]).unify_dictionaries()

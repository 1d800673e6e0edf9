"""The index of a store: one table with a row for every sample, and the account of the run that follows from it."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.console import human_bytes
from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.store.ledger import Ledger, Receipt, SampleRecord

__all__ = ["Summary", "read_index", "write_index"]


SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("unit", pa.int64()),
        ("status", pa.dictionary(pa.int8(), pa.string())),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
        ("detail", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("transform", pa.string()),
        ("flags", pa.string()),
        ("orientation", pa.int8()),
        ("decoder", pa.dictionary(pa.int8(), pa.string())),
        ("sha256", pa.string()),
        ("explained_variance", pa.float32()),
    ]
)
_ROWS_AT_ONCE = 50_000
# Robust standard deviations below the median.
_OUTLIER = 3.0
# Fits of a set may be so alike that three deviations are nothing: less than this below the median is no outlier.
_SHORTFALL = 0.05


@dataclass
class Summary:
    """What became of every sample: ``samples == ok + failed``."""

    units: int = 0
    samples: int = 0
    ok: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    failed_units: list[int] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, receipt: Receipt) -> None:
        """Count one unit."""
        self.samples += len(receipt.samples)
        for record in receipt.samples:
            if record.status == "ok":
                self.ok += 1
            else:
                self.failed += 1
                self.reasons[record.reason] += 1
        self.seconds.update(receipt.seconds)
        self.bytes.update(receipt.sizes)

    def text(self) -> str:
        """The account, for the end of a run."""
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
        lines += [f"failed: {count:6d}  {reason}" for reason, count in self.reasons.most_common()]
        if self.failed_units:
            lines.append(f"units failed for good: {len(self.failed_units)} of {self.units}")
        lines.append(f"input {self.samples} = ok {self.ok} + failed {self.failed}")
        return "\n".join(lines)


def write_index(out: str, plan: Plan, ledger: Ledger, failures: Mapping[int, Receipt]) -> Summary:
    """Gather all receipts into ``OUT/index.parquet``.

    Args:
        failures: accounts of the units that failed in this run, by number.

    Raises:
        StoreError: a unit has neither a receipt nor an account, or its receipt lists other samples than the plan.
    """
    summary = Summary(units=plan.units, faults=plan.faults)
    handle, path = tempfile.mkstemp(suffix=".parquet")
    os.close(handle)
    try:
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            rows: list[dict[str, object]] = []
            keys = map(plan.unit, range(plan.units))
            for key, found in ledger.receipts((key, plan.shards[key.shard].digest) for key in keys):
                receipt = found or failures.get(key.unit)
                if receipt is None or len(receipt.samples) != len(key):
                    counted = "no receipt" if receipt is None else f"{len(receipt.samples)} samples in its receipt"
                    raise StoreError(f"{key} has {counted}, so not every sample is accounted for; run the job again")
                if found is None:
                    summary.failed_units.append(key.unit)
                summary.add(receipt)
                rows += [_row(record, plan.shards[key.shard].url, key.unit) for record in receipt.samples]
                if len(rows) >= _ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        _flag_outliers(path)
        with open(path, "rb") as file:
            storage.write_atomic(storage.join(out, "index.parquet"), file.read())
    finally:
        os.remove(path)
    if summary.samples != plan.samples or summary.samples != summary.ok + summary.failed:
        raise StoreError(
            f"{plan.samples} samples planned, {summary.samples} accounted for as {summary.ok} ok and "
            f"{summary.failed} failed; this is a fault of the program"
        )
    return summary


def _flag_outliers(path: str) -> None:
    """Add the flag ``fit_outlier`` to images whose fit explains far less than those of the data set mostly do."""
    explained = pq.read_table(path, columns=["explained_variance"])["explained_variance"].to_numpy()
    known = explained[np.isfinite(explained)]
    if not len(known):
        return
    median = np.median(known)
    # What a normal distribution's standard deviation is to its median absolute deviation.
    spread = 1.4826 * np.median(np.abs(known - median))
    limit = median - max(_OUTLIER * spread, _SHORTFALL)
    (outliers,) = np.nonzero(~(explained >= limit) & np.isfinite(explained))
    table = pq.read_table(path)
    flags = table["flags"].to_pylist()
    for row in outliers:
        flags[row] = f"{flags[row]} fit_outlier".strip()
    place = table.schema.get_field_index("flags")
    pq.write_table(table.set_column(place, "flags", pa.array(flags, pa.string())), path, compression="zstd")


def _row(record: SampleRecord, shard: str, unit: int) -> dict[str, object]:
    height, width = record.source_size or (None, None)
    return {
        "row": record.row,
        "key": record.key,
        "shard": shard,
        "unit": unit,
        "status": record.status,
        "reason": record.reason,
        "detail": record.detail,
        "height": height,
        "width": width,
        "transform": json.dumps(record.transform) if record.transform else "",
        "flags": " ".join(record.flags),
        "orientation": record.orientation,
        "decoder": record.decoder,
        "sha256": record.sha256,
        "explained_variance": record.explained_variance,
    }


def read_index(out: str, columns: list[str] | None = None) -> pa.Table:
    """The index of a finished store.

    Raises:
        StoreError: there is none yet.
    """
    try:
        data = storage.read_bytes(storage.join(out, "index.parquet"))
    except FileNotFoundError as error:
        raise StoreError(
            f"{out} has no index.parquet: the job that makes the store has not ended; run it to its end"
        ) from error
    return pq.read_table(pa.BufferReader(data), columns=columns)

"""The files of the index: a partition for the samples of each thousand units."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.store.fields import read_fields
from pipeline.store.parquet import open_parquet

__all__ = [
    "INDEX_SCHEMA",
    "ROWS_PER_GROUP",
    "PartitionFacts",
    "equals",
    "explained_variance",
    "list_partitions",
    "partition_place",
    "read_facts",
    "write_partition",
]

ROWS_PER_GROUP = 50_000
_HASH = pa.binary(32)
# What a loader reads stands last, beside the footer: one request of a remote partition brings both.
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("unit", pa.int64()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
        ("detail", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("transform", pa.string()),
        ("flags", pa.string()),
        ("orientation", pa.int8()),
        ("decoder", pa.dictionary(pa.int8(), pa.string())),
        ("sha256", _HASH),
        ("label_sha256", pa.map_(pa.string(), _HASH)),
        ("explained_variance", pa.float32()),
        ("row", pa.int64()),
        ("status", pa.dictionary(pa.int8(), pa.string())),
    ]
)
_NAME = re.compile(r"(\d{6,})\.parquet")
_FACTS = b"featup"


@dataclass
class PartitionFacts:
    """What a partition says of its samples as a whole; kept in its metadata, so that sums need no column.

    Attributes:
        plan: identity of the part of the plan that the partition covers.
        sealed: whether it was built from a segment, and stands as long as that does.
        samples: how many there are, ``ok + failed``.
        ok: samples that are in the store.
        failed: samples that are not.
        reasons: failed samples by reason.
        failed_units: units without a receipt, whose samples failed with them.
        seconds: sums over units, by stage.
        bytes: sums over units, by stage.
        fits: samples with an explained variance.
        outliers: samples with the flag ``fit_outlier``.
    """

    plan: str
    sealed: bool
    samples: int = 0
    ok: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    failed_units: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    fits: int = 0
    outliers: int = 0

    def count(self, table: pa.Table) -> None:
        """Add the samples of a piece of the partition."""
        ok = int(equals(table["status"], "ok").sum())
        self.samples += len(table)
        self.ok += ok
        self.failed += len(table) - ok
        reasons = Counter(self.reasons)
        for chunk in table["reason"].chunks:
            codes = np.bincount(chunk.indices.to_numpy(), minlength=len(chunk.dictionary))
            reasons.update({name: int(n) for name, n in zip(chunk.dictionary.to_pylist(), codes, strict=True) if n})
        del reasons[""]
        self.reasons = dict(reasons)
        self.fits += int(np.isfinite(explained_variance(table)).sum())


def explained_variance(table: pa.Table) -> NDArray[np.float32]:
    """The column of that name, NaN where there is no fit."""
    values: NDArray[np.float32] = table["explained_variance"].to_numpy()
    return values


def equals(column: pa.ChunkedArray, text: str) -> NDArray[np.bool_]:
    """Where a dictionary-encoded column holds ``text``."""
    masks = [
        chunk.indices.to_numpy() == position
        for chunk in column.chunks
        for position in [[*chunk.dictionary.to_pylist(), text].index(text)]
    ]
    return np.concatenate(masks) if masks else np.zeros(0, np.bool_)


def partition_place(out: str, number: int) -> str:
    """Where the partition of segment ``number`` of a store lies."""
    return storage.join(out, "index", f"{number:06d}.parquet")


def list_partitions(out: str) -> NDArray[np.int64]:
    """Numbers of the partitions that are there, sorted."""
    folder = storage.join(out, "index")
    names = storage.list_files(folder)
    return np.sort(np.fromiter((int(match[1]) for match in map(_NAME.fullmatch, names) if match), np.int64))


def read_facts(out: str, number: int) -> PartitionFacts | None:
    """The facts of a partition; ``None`` where there is none, or one that is damaged and must be written anew."""
    try:
        metadata = open_parquet(partition_place(out, number)).metadata
        values: dict[str, Any] = json.loads(metadata.metadata[_FACTS])
        facts = read_fields(PartitionFacts, values, "an index partition")
    except (FileNotFoundError, StoreError, ValueError, KeyError):
        return None
    facts.failed_units = list(facts.failed_units)
    return facts if facts.samples == metadata.num_rows else None


def write_partition(out: str, number: int, tables: Iterable[pa.Table], facts: PartitionFacts) -> None:
    """Write a partition from its pieces in row order, atomically and durably.

    Args:
        out: the store.
        number: of the segment.
        tables: pieces of :data:`INDEX_SCHEMA`; ``facts`` may be completed while they are iterated over.
        facts: kept in the metadata.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, INDEX_SCHEMA, compression="zstd", write_statistics=False, write_page_checksum=True
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        writer.add_key_value_metadata({_FACTS.decode(): json.dumps(asdict(facts))})
    storage.write_atomic(partition_place(out, number), sink.getvalue().to_pybytes())

"""The files of the index: a partition for the samples of each thousand units."""

import re

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.inputs import storage

__all__ = ["INDEX_SCHEMA", "list_partitions", "partition_place"]

_HASH = pa.binary(32)
INDEX_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("status", pa.dictionary(pa.int8(), pa.string())),
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
    ]
)
_NAME = re.compile(r"(\d{6,})\.parquet")


def partition_place(out: str, number: int) -> str:
    """Where the partition of segment ``number`` of a store lies."""
    return storage.join(out, "index", f"{number:06d}.parquet")


def list_partitions(out: str) -> NDArray[np.int64]:
    """Numbers of the partitions that are there, sorted."""
    folder = storage.join(out, "index")
    names = storage.with_retries(lambda: storage.list_files(folder), what=f"listing {folder}")
    return np.sort(np.fromiter((int(match[1]) for match in map(_NAME.fullmatch, names) if match), np.int64))

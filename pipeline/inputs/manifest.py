"""Manifests: images that lie in no tar, a fixed range of a sorted list each, as a shard of the plan.

A manifest names the files of every sample with the size and the stamp that they had when they were listed; of frames
and rows (:mod:`pipeline.inputs.places`), with their share of the file's size and a mark of the whole. It is a parquet
file beside the plan (``OUT/plan/images``), so that units, rows, receipts and resume are what they are for tars.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, Reason
from pipeline.inputs import storage
from pipeline.inputs.tar import IndexedSample, Member, ShardIndex
from pipeline.redaction import redact

__all__ = [
    "FOLDER",
    "is_manifest",
    "load_manifest",
    "manifest_bytes",
    "manifest_name",
    "manifest_place",
    "manifest_samples",
    "shard_name",
]

FOLDER = "images"
"""The folder of a store's manifests, below its plan."""
_ENDING = ".images.parquet"
# Of format 1 are manifests of files alone: without marks and problems.
_FORMAT, _READ = b"2", (b"1", b"2")
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("ext", pa.list_(pa.string())),
        ("url", pa.list_(pa.string())),
        ("size", pa.list_(pa.int64())),
        ("stamp", pa.list_(pa.string())),
        ("mark", pa.list_(pa.uint32())),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def is_manifest(url: str) -> bool:
    """Whether a shard is a manifest, by its name."""
    return url.endswith(_ENDING)


def manifest_place(url: str, index_dir: str) -> str:
    """Where a shard of a store lies: of a manifest, beside the store's indices wherever these are now."""
    if not is_manifest(url):
        return url
    return storage.join(index_dir.rstrip("/").rpartition("/")[0], FOLDER, url.rpartition("/")[2])


def shard_name(url: str) -> str:
    """What a shard is called in the index: its URL without credentials; of a manifest its place within the store."""
    return f"plan/{FOLDER}/{url.rpartition('/')[2]}" if is_manifest(url) else redact(url)


def manifest_name(number: int) -> str:
    """The file name of a store's manifest ``number``."""
    return f"{number:06d}{_ENDING}"


def manifest_bytes(samples: Sequence[IndexedSample], ignored: Mapping[str, int]) -> bytes:
    """A manifest as a file: samples in order, and how many files were ignored by which rule."""
    columns = [pa.array([sample.key for sample in samples], pa.string())]
    for field in list(_SCHEMA)[1:-2]:
        values = [[getattr(member, field.name) for member in sample.members] for sample in samples]
        columns.append(pa.array(values, field.type))
    for part in (0, 1):
        columns.append(pa.array([sample.problem and sample.problem[part] for sample in samples], pa.string()))
    schema = _SCHEMA.with_metadata({"images": _FORMAT, "ignored": json.dumps(dict(ignored))})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def manifest_samples(data: bytes, url: str) -> tuple[tuple[IndexedSample, ...], dict[str, int]]:
    """The samples of a manifest, and the counts of ignored files.

    Raises:
        InputError: it is damaged, or of another program's format.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        metadata = table.schema.metadata or {}
        if metadata.get(b"images") not in _READ:
            raise ValueError(f"its format is {metadata.get(b'images')!r}, wanted {_FORMAT!r}")
        rows = table.to_pylist()
        ignored: dict[str, int] = json.loads(metadata[b"ignored"])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{url} is no list of images that can be read ({error}): it is damaged; put it back from a copy, or start "
            "a new store with another --out"
        ) from error
    return tuple(map(_sample, rows)), ignored


def _sample(row: Mapping[str, Any]) -> IndexedSample:
    marks = row.get("mark") or [0] * len(row["ext"])
    members = (
        Member(ext, 0, size, mark, place, stamp)
        for ext, place, size, stamp, mark in zip(row["ext"], row["url"], row["size"], row["stamp"], marks, strict=True)
    )
    problem = (Reason(row["reason"]), row["detail"]) if row.get("reason") else None
    return IndexedSample(row["key"], tuple(members), problem)


def load_manifest(url: str) -> ShardIndex:
    """A manifest as the index of a shard.

    Raises:
        InputError: it is damaged.
        OSError: it cannot be read, after retries.
    """
    try:
        state = storage.stat(url)
        samples, ignored = manifest_samples(storage.read_bytes(url), url)
    except FileNotFoundError:
        return ShardIndex(url, -1, "", (), ("missing: there is no such file",))
    return ShardIndex(url, state.size, state.stamp, samples, (), tuple(ignored.items()))

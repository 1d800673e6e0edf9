"""Tar indices as files: saved beside the store, and used again while the tar is the same."""

import hashlib
import json
import logging
import os
from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, Reason
from pipeline.inputs import storage
from pipeline.inputs.manifest import is_manifest, load_manifest
from pipeline.inputs.storage import FileStat, RangeReader
from pipeline.inputs.tar import IndexedSample, Member, ShardIndex, index_tar
from pipeline.redaction import redact

__all__ = ["cached_index", "index_name", "load_index", "load_saved", "save_index", "saved_index"]


logger = logging.getLogger(__name__)
# Raised whenever the file, or what becomes a sample, changes: older indices are then made again.
_FORMAT = b"2"
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("reason", pa.dictionary(pa.int32(), pa.string())),
        ("detail", pa.string()),
        ("ext", pa.list_(pa.string())),
        ("offset", pa.list_(pa.int64())),
        ("size", pa.list_(pa.int64())),
        ("mark", pa.list_(pa.uint32())),
    ]
)


def save_index(index: ShardIndex) -> bytes:
    """The index as a parquet file: a row for each sample, a list column for each property of its members.

    Credentials and signatures in the tar's URL are left out.
    """
    members = [member for sample in index.samples for member in sample.members]
    bounds = [0]
    for sample in index.samples:
        bounds.append(bounds[-1] + len(sample.members))
    columns: list[pa.Array] = [
        pa.array([sample.key for sample in index.samples], pa.string()),
        pa.array([sample.problem and sample.problem[0].value for sample in index.samples], pa.string()),
        pa.array([sample.problem and sample.problem[1] for sample in index.samples], pa.string()),
    ]
    for field in list(_SCHEMA)[3:]:
        values = pa.array([getattr(member, field.name) for member in members], field.type.value_type)
        columns.append(pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values))
    columns[1] = columns[1].dictionary_encode()
    about = {
        "url": redact(index.url),
        "size": index.size,
        "stamp": index.stamp,
        "faults": [redact(fault) for fault in index.faults],
        "ignored": index.ignored,
    }
    schema = _SCHEMA.with_metadata({"tarindex": _FORMAT, "about": json.dumps(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def load_index(data: bytes) -> ShardIndex:
    """The index that `save_index` wrote, under its redacted URL.

    Raises:
        InputError: the bytes are damaged, or of another format.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not an index that can be read: {error}; remove it, and it is made again") from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"tarindex") != _FORMAT:
        version = metadata.get(b"tarindex")
        raise InputError(f"index of format {version!r}, wanted {_FORMAT!r}; remove it, and it is made again")
    about = json.loads(metadata[b"about"])
    table = table.combine_chunks()
    lists = [table.column(field.name).combine_chunks() for field in list(_SCHEMA)[3:]]
    members = list(map(Member, *(column.flatten().to_pylist() for column in lists)))
    bounds = pairwise(lists[0].offsets.to_pylist())
    samples = tuple(
        IndexedSample(key, tuple(members[start:stop]), None if reason is None else (Reason(reason), detail))
        for key, reason, detail, (start, stop) in zip(
            *(table.column(name).to_pylist() for name in ("key", "reason", "detail")), bounds, strict=True
        )
    )
    ignored = tuple((rule, count) for rule, count in about["ignored"])
    return ShardIndex(about["url"], about["size"], about["stamp"], samples, tuple(about["faults"]), ignored)


def cached_index(url: str, cache_dir: str, *, read: RangeReader = storage.read_range) -> ShardIndex:
    """The index of a tar: the saved one while the tar's size and stamp stand, else a new one, which is saved.

    A tar whose store gives no stamp is indexed each time, as nothing would tell that it was replaced. An
    index in the cache that cannot be read is made again. A manifest is its own index. Raises what `index_tar` raises.
    """
    if is_manifest(url):
        return load_manifest(url)
    saved = load_saved(url, cache_dir)
    if saved is not None:
        try:
            state = storage.stat(url)
        except FileNotFoundError:
            state = FileStat(-1, "")
        if state.stamp and state == FileStat(saved.size, saved.stamp):
            return saved
    index = index_tar(url, read=read)
    if index.size >= 0:
        storage.write_atomic(storage.join(cache_dir, index_name(url)), save_index(index))
    return index


def saved_index(url: str, cache_dir: str) -> ShardIndex:
    """The index that `cached_index` saved, without a look at the tar.

    Raises:
        InputError: there is none that can be read.
    """
    saved = load_saved(url, cache_dir)
    if saved is None:
        raise InputError(f"no index of {url} in {cache_dir}; run the job again, so that its plan is made anew")
    return saved


def index_name(url: str) -> str:
    """The file name of a tar's saved index: by its URL without the signature, which changes from run to run."""
    return hashlib.sha256(os.fsencode(redact(url))).hexdigest()[:32] + ".parquet"


def load_saved(url: str, cache_dir: str) -> ShardIndex | None:
    """The saved index of a tar; None where there is none, or (which is logged) none that can be read.

    A manifest is its own index: the one that was saved is the one that is there.
    """
    if is_manifest(url):
        index = load_manifest(url)
        return index if index.size >= 0 else None
    place = storage.join(cache_dir, index_name(url))
    try:
        index = load_index(storage.read_bytes(place))
    except FileNotFoundError:
        return None
    except InputError as error:
        logger.warning("%s: %s", place, error)
        return None
    return replace(index, url=url) if index.url == redact(url) else None

"""Tar indices as files: saved beside the store, and used again while the tar is the same."""

import hashlib
import json
import logging
import os
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, Reason
from pipeline.inputs import storage
from pipeline.inputs.storage import FileStat, RangeReader
from pipeline.inputs.tar import IndexedSample, Member, ShardIndex, index_tar

__all__ = ["cached_index", "load_index", "save_index", "saved_index"]


logger = logging.getLogger(__name__)
_FORMAT = b"1"
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
    """The index as a parquet file: a row for each sample, a list column for each property of its members."""
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
    about = {"url": index.url, "size": index.size, "stamp": index.stamp, "faults": index.faults}
    schema = _SCHEMA.with_metadata({"tarindex": _FORMAT, "about": json.dumps(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def load_index(data: bytes) -> ShardIndex:
    """What `save_index` made bytes of. InputError where the bytes are damaged or of another format."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not an index that can be read: {error}; remove it, and it is made again") from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"tarindex") != _FORMAT:
        found = metadata.get(b"tarindex")
        raise InputError(f"index of format {found!r}, wanted {_FORMAT!r}; remove it, and it is made again")
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
    return ShardIndex(about["url"], about["size"], about["stamp"], samples, tuple(about["faults"]))


def cached_index(url: str, cache_dir: str, *, read: RangeReader = storage.read_range) -> ShardIndex:
    """The index of a tar: the saved one while the tar's size and stamp stand, else made anew and saved.

    A tar whose store gives no stamp is indexed each time, as nothing would tell that it was replaced. An
    index in the cache that cannot be read is made again. Raises what `index_tar` raises.
    """
    place = _place(url, cache_dir)
    saved = _saved_index(place)
    if saved is not None and saved.url == url:
        try:
            state = storage.with_retries(lambda: storage.stat(url), what=f"looking up {url}")
        except FileNotFoundError:
            state = FileStat(-1, "")
        if state.stamp and state == FileStat(saved.size, saved.stamp):
            return saved
    index = index_tar(url, read=read)
    if index.size >= 0:
        storage.write_atomic(place, save_index(index))
    return index


def saved_index(url: str, cache_dir: str) -> ShardIndex:
    """The index that `cached_index` saved, without a look at the tar.

    Raises InputError where there is none that can be read.
    """
    saved = _saved_index(_place(url, cache_dir))
    if saved is None:
        raise InputError(f"no index of {url} in {cache_dir}; run the job again, so that its plan is made anew")
    return saved


def _place(url: str, cache_dir: str) -> str:
    return storage.join(cache_dir, hashlib.sha256(os.fsencode(url)).hexdigest()[:32] + ".parquet")


def _saved_index(place: str) -> ShardIndex | None:
    try:
        return load_index(storage.read_bytes(place))
    except FileNotFoundError:
        return None
    except InputError as error:
        logger.warning("%s: %s", place, error)
        return None

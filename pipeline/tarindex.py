"""Where every sample of a tar shard lies: an index made from the headers, without reading the data.

Names become samples exactly as in webdataset. What is different is trouble: where ``tarfile``, and with it
webdataset, ends without a word at the first header it cannot read, or raises and gives up the whole shard,
this index goes on behind the damage, lists what is lost, and keeps every sample that can be read.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import InputError, Reason
from pipeline.storage import FileStat, RangeReader

__all__ = [
    "BLOCK",
    "IndexedSample",
    "Member",
    "ShardIndex",
    "cached_index",
    "header_mark",
    "index_tar",
    "load_index",
    "save_index",
    "saved_index",
    "split_name",
]

logger = logging.getLogger(__name__)

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_FORMAT = b"1"

# One local read holds the headers of a few small neighbours; a remote one is long enough to be worth its
# latency.
_LOCAL_STEP = 4 << 10
_REMOTE_STEP = 8 << 20
_SEARCH_STEP = 1 << 20

# Far above what paths need (extended attributes travel here too), far below what could exhaust memory.
_LONGEST_EXTENSION = 16 << 20

# Writers fill up the last record, which is 10 KiB by default and 1 MiB at most in practice.
_LONGEST_END = 1 << 20

_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_EXTENSION_TYPES = (*_PAX_TYPES, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")

_SAMPLE_NAME = re.compile(r"(?P<key>(?:.*/)?[^.]+)\.(?P<ext>[^/]*)")
_META_NAME = re.compile(r"__[^/]*__($|/)")

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: extension, where its data lie (bytes), and a mark of the header before them."""

    ext: str
    offset: int
    size: int
    mark: int


@dataclass(frozen=True, slots=True)
class IndexedSample:
    """One sample: key, members in the order of the tar, and why it cannot be used (None where it can)."""

    key: str
    members: tuple[Member, ...]
    problem: tuple[Reason, str] | None = None


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one tar, in order.

    Attributes:
        url: the tar's name.
        size: its size in bytes when it was indexed; -1 where it is missing.
        stamp: what its store said of its version then.
        samples: every sample of which a header was found.
        faults: what is wrong with the tar as a whole; each text begins with its kind and a colon
            (``missing``, ``empty``, ``compressed``, ``truncated``, ``damaged``, ``not a tar``, ``no
            end-of-archive mark``). The last kind alone loses no sample that can be known of.
    """

    url: str
    size: int
    stamp: str
    samples: tuple[IndexedSample, ...]
    faults: tuple[str, ...]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member's path, as in webdataset; None if it is of no sample.

    The key is the path up to the first dot of the base name. Base names without a dot, those that begin with
    a dot (unless no dot comes before them in the path: webdataset then takes the folder for the key), and
    whatever lies under or is called ``__name__`` belong to no sample.
    """
    match = None if _META_NAME.match(name) else _SAMPLE_NAME.fullmatch(name)
    return (match["key"], match["ext"].lower()) if match else None


def header_mark(block: bytes) -> int:
    """A number that tells this header from another: it covers name, size, time and mode."""
    return zlib.crc32(block)


@dataclass(frozen=True, slots=True)
class _Found:
    """A regular file in the tar, as its headers tell of it."""

    name: str
    offset: int
    size: int
    mark: int
    problem: tuple[Reason, str] | None


class _Window:
    """Reads a file forward in steps, so that near headers come by one request."""

    def __init__(self, url: str, size: int, read: RangeReader) -> None:
        self.url = url
        self.size = size
        self._read = read
        self._step = _LOCAL_STEP if storage.is_local(url) else _REMOTE_STEP
        self._start = 0
        self._data = b""

    def at(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``, fewer at the end of the file."""
        stop = min(offset + count, self.size)
        if stop <= offset:
            return b""
        if offset < self._start or stop > self._start + len(self._data):
            ahead = min(max(stop, offset + self._step), self.size)
            self._start, self._data = offset, storage.fetch(self.url, offset, ahead, self._read)
        return self._data[offset - self._start : stop - self._start]

    def skip_zeros(self, offset: int) -> int:
        """The first block from ``offset`` (a block boundary) that is not all zero, or the file's size."""
        for start in range(offset, self.size, _SEARCH_STEP):
            data = self.at(start, _SEARCH_STEP)
            zeros = len(data) - len(data.lstrip(b"\0"))
            if zeros < len(data):
                return start + zeros // BLOCK * BLOCK
        return self.size

    def find_header(self, offset: int) -> int:
        """The first header from ``offset`` (a block boundary) that is valid beyond doubt, or the file's size.

        Only headers with the ustar magic count (every format since 1988): a checksum alone is met by chance.
        A tar inside a member whose own header is lost is taken for a part of this one.
        """
        for start in range(offset, self.size, _SEARCH_STEP):
            data = self.at(start, _SEARCH_STEP)
            magic = data.find(b"ustar")
            while magic >= 0:
                block = magic - 257
                if block >= 0 and block % BLOCK == 0 and _header(data[block : block + BLOCK]) is not None:
                    return start + block
                magic = data.find(b"ustar", magic + 1)
        return self.size


def _header(block: bytes) -> tarfile.TarInfo | None:
    """What a header says, None for other blocks. Bytes that are no UTF-8 become ``\\xNN``, to be storable."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    return info if info.size >= 0 else None


def _pax_records(body: bytes) -> dict[str, str] | None:
    """Keyword and value of every pax record; None where they cannot be read."""
    records = {}
    body = body.rstrip(b"\0")
    position = 0
    while position < len(body):
        match = _PAX_RECORD.match(body, position)
        stop = position + int(match[1]) if match else 0
        if match is None or stop <= match.end() or body[stop - 1 : stop] != b"\n":
            return None
        keyword = match[2].decode("utf-8", "backslashreplace")
        records[keyword] = body[match.end() : stop - 1].decode("utf-8", "backslashreplace")
        position = stop
    if "path" in records:
        records["path"] = records["path"].rstrip("/")
    return records if records.get("size", "0").isdecimal() else None


def _extension_records(info: tarfile.TarInfo, window: _Window, data: int) -> dict[str, str] | None:
    """What an extension says of the next member (the global kind: of all that follow), as pax records."""
    if info.size > _LONGEST_EXTENSION:
        return None
    body = window.at(data, info.size)
    if info.type in _PAX_TYPES:
        return _pax_records(body)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.partition(b"\0")[0].decode("utf-8", "backslashreplace")}
    return {}


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


@dataclass(slots=True)
class _Extensions:
    """What the header extensions met so far say of the member to come."""

    records: dict[str, str]
    readable: bool = True


def _scan(window: _Window, faults: list[str]) -> Iterator[_Found]:
    """All regular files of a tar; appends to ``faults`` what is wrong with it."""
    total = window.size
    lasting: dict[str, str] = {}
    ahead: _Extensions | None = None
    ended = False
    offset = 0
    while offset < total:
        block = window.at(offset, BLOCK)
        info = _header(block)
        if info is None and len(block) < BLOCK and block.strip(b"\0"):
            faults.append(f"truncated: the file ends at byte {total}, inside a header; what followed is lost")
            return
        if info is None:
            offset, ahead, ended = _skip(window, offset, faults), None, True
            continue
        ended = False
        data = offset + BLOCK
        size = info.size
        if info.type in _EXTENSION_TYPES:
            ahead = ahead or _Extensions({})
            records = {} if data + size > total else _extension_records(info, window, data)
            if records is None:
                faults.append(f"damaged: the header extension at byte {offset} cannot be read")
                ahead.readable = False
            elif info.type == tarfile.XGLTYPE:
                lasting |= records
            else:
                ahead.records = records | ahead.records
            offset = data + _padded(size)
            continue
        told = lasting | (ahead.records if ahead else {})
        size = int(told.get("size", size))
        if info.type in tarfile.REGULAR_TYPES:
            name = told.get("GNU.sparse.name", told.get("path", info.name))
            data += _sparse_map_size(window, info, block, data)
            problem = None
            if data + size > total:
                text = f"the tar ends at byte {total}, and {name} needs bytes {data} to {data + size}"
                problem = (Reason.TAR_TRUNCATED, text)
            elif ahead and not ahead.readable:
                problem = (Reason.TAR_DAMAGED, f"the extension before the header of {name} cannot be read")
            elif info.type == tarfile.GNUTYPE_SPARSE or any(word.startswith("GNU.sparse.") for word in told):
                problem = (Reason.UNSUPPORTED, f"{name} is a sparse file; write the tar without --sparse")
            yield _Found(name, data, size, header_mark(block), problem)
        elif info.type in tarfile.SUPPORTED_TYPES:
            # Links, folders and devices have no data, whatever size their header gives (as tarfile takes it).
            size = 0
        offset = data + _padded(size)
        ahead = None
    if offset > total or ahead:
        faults.append(f"truncated: the file ends at byte {total}, where more must follow; what followed is lost")
    elif not ended:
        faults.append(
            f"no end-of-archive mark: the last member ends at byte {total} as the file does; nothing tells "
            "whether more followed"
        )


def _skip(window: _Window, start: int, faults: list[str]) -> int:
    """Where the next header lies, from a block that is none; the file's size if there is no other."""
    total = window.size
    stop = window.skip_zeros(start)
    if stop == start:
        stop = window.find_header(start + BLOCK)
        faults.append(f"damaged: bytes {start} to {stop} hold no valid header; members there are lost")
    elif stop < total:
        faults.append(
            f"damaged: bytes {start} to {stop} are zero and more follows; either members are lost there, or "
            "two tars were joined"
        )
    elif stop - start > _LONGEST_END:
        faults.append(
            f"damaged: the last {stop - start} bytes are zero, longer than any end-of-archive mark; "
            "probably a copy that was not finished, and members there are lost"
        )
    return stop


def _sparse_map_size(window: _Window, info: tarfile.TarInfo, block: bytes, data: int) -> int:
    """Bytes between the header of a sparse file of the old GNU kind and its data; 0 for other files."""
    stop = data
    more = info.type == tarfile.GNUTYPE_SPARSE and block[482]
    while more:
        extension = window.at(stop, BLOCK)
        stop += BLOCK
        more = len(extension) == BLOCK and extension[504]
    return stop - data


def _group(files: Iterator[_Found]) -> Iterator[IndexedSample]:
    """Samples: neighbours of one key. A key that has gone by, or an extension that repeats, is a problem."""
    first_of: dict[str, int] = {}
    key: str | None = None
    members: dict[str, Member] = {}
    problem: tuple[Reason, str] | None = None
    position = 0
    for found in files:
        name = split_name(found.name)
        if name is None:
            continue
        if key is not None and (name[0] != key or name[1] in members):
            yield IndexedSample(key, tuple(members.values()), problem)
            position += 1
            members, problem = {}, None
        if not members:
            key = name[0]
            first = first_of.setdefault(key, position)
            if first != position:
                detail = f"key {key} comes again; the first is sample {first} of the tar, and that one is used"
                problem = (Reason.REPEATED_KEY, detail)
        members[name[1]] = Member(name[1], found.offset, found.size, found.mark)
        problem = problem or found.problem
    if key is not None:
        yield IndexedSample(key, tuple(members.values()), problem)


def index_tar(url: str, *, read: RangeReader = storage.read_range) -> ShardIndex:
    """Index of a tar, from its headers.

    A tar that is missing, empty, compressed, cut short or damaged raises nothing: ``faults`` says what is
    wrong, and the samples that can still be read are there.

    Args:
        url: local path or fsspec URL.
        read: reads byte ranges.

    Raises:
        InputError: the file may not be read, is a folder, or became shorter meanwhile.
        OSError: it cannot be read, after retries.
    """
    try:
        state = storage.with_retries(lambda: storage.stat(url), what=f"looking up {url}")
    except FileNotFoundError:
        return ShardIndex(url, -1, "", (), ("missing: there is no such file",))
    except (PermissionError, NotADirectoryError) as error:
        raise _unreadable(url, error) from error
    try:
        samples, faults = _index(_Window(url, state.size, read))
    except (PermissionError, IsADirectoryError) as error:
        raise _unreadable(url, error) from error
    return ShardIndex(url, state.size, state.stamp, samples, faults)


def _unreadable(url: str, error: OSError) -> InputError:
    return InputError(f"{url} cannot be read ({error}); check its permissions, and that it is a tar file, not a folder")


def _index(window: _Window) -> tuple[tuple[IndexedSample, ...], tuple[str, ...]]:
    block = window.at(0, BLOCK)
    if not block.strip(b"\0") and window.skip_zeros(0) == window.size:
        kind = "has no bytes" if window.size == 0 else f"is {window.size} zero bytes"
        return (), (f"empty: the file {kind}",)
    if _header(block) is None:
        for magic, codec in _COMPRESSED.items():
            if block.startswith(magic):
                cure = f"seeking is impossible in a file compressed with {codec}; store the tar uncompressed"
                return (), (f"compressed: {cure} (images are compressed already)",)
    faults: list[str] = []
    samples = tuple(_group(_scan(window, faults)))
    if not samples and _header(block) is None:
        return (), ("not a tar: no sample can be found in it",)
    if not samples:
        faults.insert(0, "empty: the tar holds no file that is named as a member of a sample (key.extension)")
    return samples, tuple(faults)


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

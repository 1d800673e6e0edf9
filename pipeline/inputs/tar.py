"""Where every sample of a tar shard lies: an index made from the headers, without reading the data.

Names become samples exactly as in webdataset. What is different is trouble: where ``tarfile``, and with it
webdataset, ends without a word at the first header it cannot read, or raises and gives up the whole shard,
this index goes on behind the damage, lists what is lost, and keeps every sample that can be read.
"""

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pipeline.errors import InputError, Reason
from pipeline.inputs import storage
from pipeline.inputs.storage import RangeReader

__all__ = ["BLOCK", "IndexedSample", "Member", "ShardIndex", "header_mark", "index_tar", "split_name"]


BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
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

    @cached_property
    def digest(self) -> str:
        """Identity of the content as far as headers tell: sha256 over each member's name, size and header, hex."""
        content = hashlib.sha256()
        for sample in self.samples:
            for member in sample.members:
                content.update(f"{sample.key}.{member.ext}\0{member.size}\0{member.mark}\0".encode())
        return content.hexdigest()


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

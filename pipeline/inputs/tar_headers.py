"""The members of a tar, of every type, from its headers. Behind damage the scan goes on, and says what is lost.

Where ``tarfile``, and with it webdataset, ends without a word at the first header it cannot read, or raises and gives
up the whole shard, this scan goes on behind the damage and keeps every member that can be read.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.errors import Reason
from pipeline.inputs.tar_window import BLOCK, Window, padded

__all__ = ["TarMember", "header_mark", "parse_header", "scan"]


# Far above what paths need (extended attributes travel here too), far below what could exhaust memory.
_LONGEST_EXTENSION = 16 << 20
# Writers fill up the last record, which is 10 KiB by default and 1 MiB at most in practice.
_LONGEST_END = 1 << 20
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_EXTENSION_TYPES = (*_PAX_TYPES, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_DIRECTORY_TYPES = (tarfile.DIRTYPE, b"D")  # D: a directory of GNU's incremental archives, with a list as its data
_VOLUME_LABEL = b"V"
_KINDS = {
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
    b"M": "the end of a file that begins on another volume",
}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a tar as its headers describe it.

    ``kind`` is ``file``, ``directory``, ``volume label`` or ``other``; ``problem`` says why its data cannot be used.
    """

    name: str
    kind: str
    offset: int
    size: int
    mark: int
    problem: tuple[Reason, str] | None = None


def header_mark(block: bytes) -> int:
    """A number that tells this header from another: it covers name, size, time and mode."""
    return zlib.crc32(block)


def parse_header(block: bytes) -> tarfile.TarInfo | None:
    """What a header says, None for other blocks. Bytes that are no UTF-8 become ``\\xNN``, to be storable."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    return info if info.size >= 0 else None


def _is_header(block: bytes) -> bool:
    return parse_header(block) is not None


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


def _extension_records(info: tarfile.TarInfo, window: Window, data: int) -> dict[str, str] | None:
    """What an extension says of the next member (the global kind: of all that follow), as pax records."""
    if info.size > _LONGEST_EXTENSION:
        return None
    body = window.at(data, info.size)
    if info.type in _PAX_TYPES:
        return _pax_records(body)
    keyword = "path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
    return {keyword: body.partition(b"\0")[0].decode("utf-8", "backslashreplace")}


@dataclass(slots=True)
class _Extensions:
    """What the header extensions met so far say of the member to come."""

    records: dict[str, str]
    readable: bool = True


def scan(window: Window, faults: list[str]) -> Iterator[TarMember]:
    """All members of a tar; appends to ``faults`` what is wrong with it."""
    total = window.size
    lasting: dict[str, str] = {}
    files: dict[str, TarMember] = {}
    ahead: _Extensions | None = None
    ended = False
    offset = 0
    while offset < total:
        block = window.at(offset, BLOCK)
        info = parse_header(block)
        if info is None and len(block) < BLOCK and block.strip(b"\0"):
            faults.append(f"truncated: the file ends at byte {total}, inside a header; what followed is lost")
            return
        if info is None:
            offset, ahead, ended = _skip(window, offset, faults), None, True
            continue
        ended = False
        if info.type in _EXTENSION_TYPES:
            ahead = ahead or _Extensions({})
            data = offset + BLOCK
            records = {} if data + info.size > total else _extension_records(info, window, data)
            if records is None:
                faults.append(f"damaged: the header extension at byte {offset} cannot be read")
                ahead.readable = False
            elif info.type == tarfile.XGLTYPE:
                lasting |= records
            else:
                ahead.records = records | ahead.records
            offset = data + padded(info.size)
            continue
        records = lasting | (ahead.records if ahead else {})
        member, offset = _member(window, info, block, offset, records, files)
        if ahead and not ahead.readable and member.problem is None:
            text = f"the extension before the header of {member.name} cannot be read"
            member = replace(member, problem=(Reason.TAR_DAMAGED, text))
        if member.kind == "file":
            files[member.name] = member
        yield member
        ahead = None
    if offset > total or ahead:
        faults.append(f"truncated: the file ends at byte {total}, where more must follow; what followed is lost")
    elif not ended:
        faults.append(
            f"no end-of-archive mark: the last member ends at byte {total} as the file does; nothing tells "
            "whether more followed"
        )


def _member(
    window: Window,
    info: tarfile.TarInfo,
    block: bytes,
    offset: int,
    records: dict[str, str],
    files: dict[str, TarMember],
) -> tuple[TarMember, int]:
    """The member of a header at ``offset``, and where the next header lies."""
    data = offset + BLOCK
    size = int(records.get("size", info.size))
    mark = header_mark(block)
    name = records.get("GNU.sparse.name", records.get("path", info.name))
    if info.type in tarfile.REGULAR_TYPES:
        data += _sparse_map_size(window, info, block, data)
        problem = None
        if data + size > window.size:
            text = f"the tar ends at byte {window.size}, and {name} needs bytes {data} to {data + size}"
            problem = (Reason.TAR_TRUNCATED, text)
        elif info.type == tarfile.GNUTYPE_SPARSE or any(word.startswith("GNU.sparse.") for word in records):
            problem = (Reason.UNSUPPORTED, f"{name} is a sparse file; write the tar without --sparse")
        return TarMember(name, "file", data, size, mark, problem), data + padded(size)
    # Links, directories and devices have no data, whatever size their header gives (as tarfile takes it).
    after = data + (0 if info.type in tarfile.SUPPORTED_TYPES else padded(size))
    if info.type in _DIRECTORY_TYPES:
        return TarMember(name, "directory", data, 0, mark), after
    if info.type == _VOLUME_LABEL:
        return TarMember(name, "volume label", data, 0, mark), after
    if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        return _link(info, name, records.get("linkpath", info.linkname), data, mark, files), after
    kind = _KINDS.get(info.type, f"a member of type {info.type!r}, which tar does not define")
    return TarMember(name, "other", data, 0, mark, (Reason.UNSUPPORTED, f"{name} is {kind}, not a file")), after


def _link(
    info: tarfile.TarInfo, name: str, target: str, data: int, mark: int, files: dict[str, TarMember]
) -> TarMember:
    """A link: a hard one to an earlier file of this tar has that file's data, others have none."""
    if info.type == tarfile.LNKTYPE and target in files:
        file = files[target]
        return TarMember(name, "file", file.offset, file.size, file.mark, file.problem)
    if info.type == tarfile.LNKTYPE:
        text = f"{name} is a hard link to {target}, and no file of that name comes before it; add the file itself"
    else:
        text = f"{name} is a symbolic link to {target}; write the tar with --dereference, so that it holds the file"
    return TarMember(name, "other", data, 0, mark, (Reason.UNSUPPORTED, text))


def _skip(window: Window, start: int, faults: list[str]) -> int:
    """Where the next header lies, from a block that is none; the file's size if there is no other."""
    total = window.size
    stop = window.skip_zeros(start)
    if stop == start:
        stop = window.find(start + BLOCK, _is_header)
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


def _sparse_map_size(window: Window, info: tarfile.TarInfo, block: bytes, data: int) -> int:
    """Bytes between the header of a sparse file of the old GNU kind and its data; 0 for other files."""
    stop = data
    more = info.type == tarfile.GNUTYPE_SPARSE and block[482]
    while more:
        extension = window.at(stop, BLOCK)
        stop += BLOCK
        more = len(extension) == BLOCK and extension[504]
    return stop - data

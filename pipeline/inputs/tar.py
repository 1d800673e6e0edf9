"""Where every sample of a tar shard lies: an index from the headers, without reading the data.

Names become samples as in webdataset. Every member of the tar is accounted for: it is part of a sample (which fails,
with the reason, where the member is a symbolic link or a device), or it is counted as ignored, by rule.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from pipeline.errors import InputError, Reason
from pipeline.inputs import storage
from pipeline.inputs.side_file import header_ranges
from pipeline.inputs.storage import RangeReader
from pipeline.inputs.tar_headers import TarMember, header_mark, parse_header, scan
from pipeline.inputs.tar_window import BLOCK, Window

__all__ = [
    "BLOCK",
    "IndexedSample",
    "Member",
    "ShardIndex",
    "describe_ignored",
    "describe_members",
    "header_mark",
    "ignored_by",
    "index_tar",
    "is_system_file",
    "split_name",
]


_SAMPLE_NAME = re.compile(r"(?P<key>(?:.*/)?[^.]+)\.(?P<ext>[^/]*)")
_META_NAME = re.compile(r"__[^/]*__($|/)")
# What Finder, Explorer, KDE, a Synology NAS and NFS leave in folders (lower case).
_SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".directory", ".localized"})
_SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", ".trashes", ".spotlight-v100", ".fseventsd", ".appledouble"})
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: extension, where its data lie (bytes), and a mark of the header before them.

    A file that is in no tar (:mod:`pipeline.inputs.manifest`) has its own URL, and the stamp it was listed with.
    """

    ext: str
    offset: int
    size: int
    mark: int
    url: str = ""
    stamp: str = ""


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
        ignored: members that are of no sample: (rule, how many), as :func:`ignored_by` names the rules.
    """

    url: str
    size: int
    stamp: str
    samples: tuple[IndexedSample, ...]
    faults: tuple[str, ...]
    ignored: tuple[tuple[str, int], ...] = ()

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
    whatever lies under or is called ``__name__`` belong to no sample. What operating systems leave in folders
    (``._x.jpg``, ``.DS_Store``, ``Thumbs.db``, ``__MACOSX/``) does not either, where webdataset makes samples of it.
    """
    if _META_NAME.match(name) or is_system_file(name):
        return None
    match = _SAMPLE_NAME.fullmatch(name)
    return (match["key"], match["ext"].lower()) if match else None


def ignored_by(name: str) -> str:
    """The rule by which a member of this name is of no sample."""
    if _META_NAME.match(name):
        return "meta (__name__)"
    base = name.rstrip("/").rpartition("/")[2]
    if is_system_file(name) or base.startswith("."):
        return "hidden or system file"
    return "no extension" if "." not in base else "no key before the extension"


def describe_ignored(ignored: Iterator[tuple[str, int]] | tuple[tuple[str, int], ...]) -> str:
    """``12 directory, 3 hidden or system file``."""
    return ", ".join(f"{count} {rule}" for rule, count in ignored)


def describe_members(sample: IndexedSample) -> str:
    """A sample's members, with the rule that gave them to it where that may surprise: for texts about a missing one."""
    extensions = [f".{member.ext}" for member in sample.members]
    text = ", ".join(extensions[:5]) + (f" and {len(extensions) - 5} more" if len(extensions) > 5 else "")
    if any(not part.isalpha() for member in sample.members for part in member.ext.split(".")[:-1]):
        base = sample.key.rpartition("/")[2]
        text += (
            f"; the key of a sample ends at the first dot of the file name, so {base}{extensions[0]} is member "
            f"{extensions[0]} of {sample.key}: if these are several samples, write their names without dots"
        )
    return text


def is_system_file(name: str) -> bool:
    """Whether a path is one of what operating systems leave in folders."""
    *folders, base = name.rstrip("/").lower().split("/")
    return base.startswith("._") or base in _SYSTEM_FILES or not _SYSTEM_FOLDERS.isdisjoint([*folders, base])


def _group(members: Iterator[TarMember], ignored: Counter[str]) -> Iterator[IndexedSample]:
    """Samples: neighbours of one key. A key that has gone by, or an extension that repeats, is a problem.

    Counts in ``ignored`` the members that are of no sample.
    """
    first_of: dict[str, int] = {}
    key: str | None = None
    files: dict[str, Member] = {}
    problem: tuple[Reason, str] | None = None
    position = 0
    for member in members:
        name = split_name(member.name)
        if member.kind in ("directory", "volume label"):
            ignored[member.kind] += 1
            continue
        if name is None:
            ignored[ignored_by(member.name)] += 1
            continue
        if key is not None and (name[0] != key or name[1] in files):
            yield IndexedSample(key, tuple(files.values()), problem)
            position += 1
            files, problem = {}, None
        if not files:
            key = name[0]
            first = first_of.setdefault(key, position)
            if first != position:
                detail = f"key {key} comes again; the first is sample {first} of the tar, and that one is used"
                problem = (Reason.REPEATED_KEY, detail)
        files[name[1]] = Member(name[1], member.offset, member.size, member.mark)
        problem = problem or member.problem
    if key is not None:
        yield IndexedSample(key, tuple(files.values()), problem)


def index_tar(url: str, *, read: RangeReader = storage.read_range) -> ShardIndex:
    """Index of a tar, from its headers.

    A tar that is missing, empty, compressed, cut short or damaged raises nothing: ``faults`` says what is
    wrong, and the samples that can still be read are there. Of a remote tar with large members the headers are read
    and the data between them are not, by parallel requests where an index of NVIDIA DALI (``.idx``) lies beside it.

    Args:
        url: local path or fsspec URL.
        read: reads byte ranges.

    Raises:
        InputError: the name is a folder, or the file became shorter meanwhile.
        EnvironmentFault: access denied.
        OSError: it cannot be read, after retries.
    """
    try:
        state = storage.stat(url)
    except FileNotFoundError:
        return ShardIndex(url, -1, "", (), ("missing: there is no such file",))
    except NotADirectoryError as error:
        raise _unreadable(url, error) from error
    try:
        window = Window(url, state.size, read, partial(header_ranges, url, state.size))
        samples, faults, ignored = _index(window)
    except IsADirectoryError as error:
        raise _unreadable(url, error) from error
    return ShardIndex(url, state.size, state.stamp, samples, faults, tuple(ignored.items()))


def _unreadable(url: str, error: OSError) -> InputError:
    return InputError(f"{url} cannot be read ({error}); check that it is a tar file, not a folder")


def _index(window: Window) -> tuple[tuple[IndexedSample, ...], tuple[str, ...], Counter[str]]:
    ignored: Counter[str] = Counter()
    block = window.at(0, BLOCK)
    if not block.strip(b"\0") and window.skip_zeros(0) == window.size:
        kind = "has no bytes" if window.size == 0 else f"is {window.size} zero bytes"
        return (), (f"empty: the file {kind}",), ignored
    if parse_header(block) is None:
        for magic, codec in _COMPRESSED.items():
            if block.startswith(magic):
                cure = f"seeking is impossible in a file compressed with {codec}; store the tar uncompressed"
                return (), (f"compressed: {cure} (images are compressed already)",), ignored
    faults: list[str] = []
    samples = tuple(_group(scan(window, faults), ignored))
    if not samples and parse_header(block) is None:
        return (), ("not a tar: no sample can be found in it",), ignored
    if not samples:
        others = f"; it holds {describe_ignored(tuple(ignored.items()))}" if ignored else ""
        faults.insert(0, f"empty: the tar holds no file that is named as a member of a sample (key.extension){others}")
    return samples, tuple(faults), ignored

"""Files by name, wherever they are: the one place that knows fsspec.

A name is a local path, a ``file://`` URL, or any URL that fsspec serves (``s3://``, ``gs://``, ``http://``,
``memory://``). Local files go through the operating system directly, so that writes are durable and ranged
reads cost one system call; remote credentials and endpoints come from fsspec's own configuration (files in
``~/.config/fsspec`` or ``FSSPEC_*`` variables).
"""

import errno
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import fsspec.core

from pipeline.errors import InputError, PipelineError

__all__ = [
    "FileStat",
    "RangeReader",
    "exists",
    "fetch",
    "is_local",
    "join",
    "list_files",
    "local_copy",
    "local_path",
    "make_dirs",
    "read_bytes",
    "read_range",
    "remove",
    "stat",
    "sync_file",
    "with_retries",
    "write_atomic",
]


T = TypeVar("T")
RangeReader: TypeAlias = Callable[[str, int, int], bytes]
"""``read(url, start, stop) -> bytes``, exactly ``stop - start`` of them; EOFError where there are fewer."""
# The same ending zarr gives to what it has not yet renamed into place, so that one rule hides both.
_TEMPORARY = ".partial"
_LASTING_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP})
# What stores call the thing that changes when an object is written again, the strongest first.
_STAMPS = (
    "ETag",
    "etag",
    "Content-MD5",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
_EXTRA_OF_SCHEME = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file's size in bytes, and a text that changes when it is rewritten ('' where the store has none)."""

    size: int
    stamp: str


def is_local(url: str) -> bool:
    """Whether the name is a path of this machine (a plain path or a ``file:`` URL)."""
    return url.startswith("file:") or "://" not in url


def local_path(url: str) -> str:
    """The operating system's path of a local name; ValueError for a remote one."""
    if not is_local(url):
        raise ValueError(f"{url} is not a local name")
    return url.removeprefix("file://").removeprefix("file:")


def join(url: str, *parts: str) -> str:
    """``url`` with ``parts`` below it; empty parts are left out."""
    below = "/".join(part.strip("/") for part in parts if part.strip("/"))
    return f"{url}{below}" if not below or url.endswith("/") else f"{url}/{below}"


def remote(url: str) -> tuple[Any, str]:
    # A listing kept in memory would hide the receipts and shards that other machines have written since.
    try:
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        scheme = url.partition("://")[0]
        extra = _EXTRA_OF_SCHEME.get(scheme)
        cure = f"pip install 'featup-datasets[{extra}]'" if extra else "install it"
        raise InputError(f"{url} needs a package that is not installed ({error}); {cure}") from error
    except ValueError as error:
        raise InputError(f"{url} cannot be served: {error}; use a path or a URL that fsspec knows") from error
    return system, path


@contextmanager
def mapped_errors(url: str) -> Iterator[None]:
    """Turn the errors that remote clients have of their own (aiohttp's, say) into OSErrors."""
    try:
        yield
    except (OSError, EOFError, PipelineError):
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def stat(url: str) -> FileStat:
    """Size and stamp of a file; FileNotFoundError where there is none, OSError where no size is told."""
    if is_local(url):
        entry = os.stat(local_path(url))
        return FileStat(entry.st_size, str(entry.st_mtime_ns))
    with mapped_errors(url):
        system, path = remote(url)
        info = system.info(path)
    if info.get("size") is None:
        raise OSError(f"{url}: the server tells no size, so ranges cannot be planned; copy the file to a store")
    return FileStat(int(info["size"]), next((str(info[name]) for name in _STAMPS if info.get(name)), ""))


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file, exactly that many.

    Raises:
        EOFError: fewer bytes came than were asked for.
        InputError: a server that ignores byte ranges.
        OSError: whatever the system or the store says.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"{url}: no such byte range: {start} to {stop}")
    if start == stop:
        return b""
    if is_local(url):
        data = _read_local(local_path(url), start, stop - start)
    else:
        with mapped_errors(url):
            system, path = remote(url)
            data = system.cat_file(path, start=start, end=stop)
    if len(data) > stop - start:
        raise InputError(
            f"{url}: {len(data)} bytes came where {stop - start} were asked for: the server ignores byte "
            "ranges; serve the shards by one that does not, or copy them to a store"
        )
    if len(data) < stop - start:
        raise EOFError(f"{url}: {len(data)} bytes came of {stop - start} from byte {start}")
    return bytes(data)


def _read_local(path: str, start: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        data = os.pread(descriptor, count, start)
        # Linux gives at most 2 GiB a call, network file systems less.
        while 0 < len(data) < count and (more := os.pread(descriptor, count - len(data), start + len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def read_bytes(url: str) -> bytes:
    """The whole of a file."""
    if is_local(url):
        with open(local_path(url), "rb") as stream:
            return stream.read()
    with mapped_errors(url):
        system, path = remote(url)
        return bytes(system.cat_file(path))


def write_atomic(url: str, *parts: bytes) -> None:
    """Write a file, of one part or of several one behind the other, so that readers see the old one or the new one.

    Never is a half of it seen; folders are made as needed.

    A local file is durable on return (file and folder are synced). A remote one is one put, which is atomic
    and durable on object stores; on file-like remotes (sftp, say) it is neither.
    """
    if not is_local(url):
        with mapped_errors(url):
            system, path = remote(url)
            system.pipe_file(path, b"".join(parts))
        return
    path = os.path.abspath(local_path(url))
    folder = os.path.dirname(path)
    make_dirs(folder)
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        with open(temporary, "xb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_file(folder)


def local_copy(url: str) -> str:
    """A local path with the bytes of ``url``: itself where it is local, else a copy that lasts as long as the process.

    Raises what ``read_bytes`` raises.
    """
    if is_local(url):
        return local_path(url)
    if url not in _copies:
        data = read_bytes(url)
        folder = tempfile.TemporaryDirectory(prefix="featup-")
        path = os.path.join(folder.name, os.path.basename(url))
        with open(path, "wb") as file:
            file.write(data)
        _copies[url] = (folder, path)
    return _copies[url][1]


_copies: dict[str, tuple[tempfile.TemporaryDirectory[str], str]] = {}


def sync_file(path: str) -> None:
    """Make a local file's bytes, or a local folder's entries, durable."""
    descriptor = os.open(local_path(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dirs(url: str) -> None:
    """Make a folder and those above it, durably; one that exists is fine."""
    if not is_local(url):
        with mapped_errors(url):
            system, path = remote(url)
            system.makedirs(path, exist_ok=True)
        return
    path = os.path.abspath(local_path(url))
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        os.makedirs(folder, exist_ok=True)
        sync_file(os.path.dirname(folder))


def exists(url: str) -> bool:
    """Whether a file or folder of that name is there."""
    if is_local(url):
        return os.path.exists(local_path(url))
    with mapped_errors(url):
        system, path = remote(url)
        return bool(system.exists(path))


def remove(url: str) -> None:
    """Remove a file; one that is not there is fine."""
    with suppress(FileNotFoundError):
        if is_local(url):
            os.unlink(local_path(url))
        else:
            with mapped_errors(url):
                system, path = remote(url)
                system.rm_file(path)


def list_files(url: str) -> list[str]:
    """Names of all files below a folder, relative to it, sorted; [] where there is no such folder.

    Files that are still being written (or were, when their writer died) are left out.
    """
    if is_local(url):
        names = list(_walk(local_path(url)))
    else:
        with mapped_errors(url):
            system, path = remote(url)
            root = path.rstrip("/") + "/"
            try:
                names = [name.removeprefix(root) for name in system.find(path) if name.startswith(root)]
            except FileNotFoundError:
                names = []
    return sorted(name for name in names if not name.endswith(_TEMPORARY))


def _walk(root: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, files in os.walk(root, onerror=fail):
        below = os.path.relpath(folder, root)
        yield from (name if below == os.curdir else f"{below}/{name}".replace(os.sep, "/") for name in files)


def with_retries(
    action: Callable[[], T],
    *,
    what: str,
    attempts: int = 4,
    first_wait: float = 0.2,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Do ``action``, again after OSErrors that may pass (connections, time-outs, input/output errors).

    Args:
        action: what to do; it must be fit to be done again from the start.
        what: names the action in the error text.
        attempts: how often at most.
        first_wait: seconds before the second attempt; each further wait is twice as long.
        sleep: waits that many seconds.

    Raises:
        OSError: the last attempt's error in context; errors that last (no such file, no permission, disk
            full) and errors of other types at once, as they are.
    """
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except OSError as error:
            if isinstance(error, _LASTING_ERRORS) or error.errno in _LASTING_ERRNOS:
                raise
            if attempt == attempts:
                text = f"{what} failed {attempts} times, the last time with {type(error).__name__}: {error}"
                raise (OSError(error.errno, text) if error.errno else OSError(text)) from error
            sleep(first_wait * 2 ** (attempt - 1))
    raise ValueError(f"{what}: attempts must be 1 or more, not {attempts}")


def fetch(url: str, start: int, stop: int, read: RangeReader = read_range) -> bytes:
    """Bytes ``start`` to ``stop`` of an input that was that long when it was indexed, retried by reopening.

    Raises:
        InputError: the file is gone or has become shorter since it was indexed.
        OSError: it cannot be read, after retries.
    """

    def attempt() -> bytes:
        try:
            return read(url, start, stop)
        except EOFError as error:
            size = stat(url).size
            if size < stop:
                raise InputError(
                    f"{url} has {size} bytes where {stop} are needed: it became shorter since it was "
                    "indexed, and was probably replaced. Run the job again, so that its plan is made from "
                    "the file as it is now"
                ) from error
            raise OSError(f"the connection ended early: {error}") from error

    try:
        return with_retries(attempt, what=f"reading bytes {start} to {stop} of {url}")
    except FileNotFoundError as error:
        raise InputError(
            f"{url} is gone since it was indexed; put it back, or run the job again, so that its plan leaves it out"
        ) from error

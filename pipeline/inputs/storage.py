"""Files by name, wherever they are: read, written, listed, with retries.

Errors that may pass are retried with growing waits. Errors that last until somebody mends the machine or the store
(disk full, access denied, no such bucket) are one line, as EnvironmentFault.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from pipeline.errors import InputChangedError, InputError
from pipeline.inputs.conditional import create_exclusive, read_with_token, replace_if
from pipeline.inputs.file_stat import FileStat, stat
from pipeline.inputs.local import (
    LOCK,
    TEMPORARY,
    make_local_dirs,
    read_file,
    read_file_range,
    sync_file,
    walk,
    write_file,
)
from pipeline.inputs.local_copies import local_copy
from pipeline.inputs.remote import error_code, filesystem, is_local, is_object_store, join, local_path, mapped_errors
from pipeline.inputs.retry import retried, with_retries

__all__ = [
    "FileStat",
    "RangeReader",
    "create_exclusive",
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
    "read_with_token",
    "remove",
    "replace_if",
    "stat",
    "sync_file",
    "with_retries",
    "write_atomic",
]


RangeReader: TypeAlias = Callable[[str, int, int], bytes]
"""``read(url, start, stop) -> bytes``, exactly ``stop - start`` of them; EOFError where there are fewer."""
_RANGE_CODES = frozenset({"InvalidRange", "416"})


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file, exactly that many, by one attempt (:func:`fetch` retries).

    Raises:
        EOFError: the file has fewer bytes.
        InputError: a server that ignores byte ranges.
        OSError: whatever the system or the store says.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"{url}: no such byte range: {start} to {stop}")
    if start == stop:
        return b""
    if is_local(url):
        data = read_file_range(local_path(url), start, stop - start)
    else:
        with mapped_errors(url):
            system, path = filesystem(url)
            try:
                data = system.cat_file(path, start=start, end=stop)
            except OSError as error:
                if error_code(error) not in _RANGE_CODES:
                    raise
                data = b""
    if len(data) > stop - start:
        raise InputError(
            f"{url}: {len(data)} bytes came where {stop - start} were asked for: the server ignores byte "
            "ranges; serve the shards by one that does not, or copy them to a store"
        )
    if len(data) < stop - start:
        raise EOFError(f"{url}: {len(data)} bytes came of {stop - start} from byte {start}")
    return bytes(data)


def read_bytes(url: str) -> bytes:
    """The whole of a file, with retries.

    Raises:
        FileNotFoundError: there is none.
        EnvironmentFault: access denied, or the store does not answer.
        OSError: another error that did not pass within the retries.
    """

    def read() -> bytes:
        if is_local(url):
            return read_file(local_path(url))
        system, path = filesystem(url)
        return bytes(system.cat_file(path))

    return retried(read, url, "reading")


def write_atomic(url: str, *parts: bytes) -> None:
    """Write a file, of one part or of several one behind the other, so that readers see the old one or the new one.

    Never is a half of it seen; folders are created as needed, buckets never are.

    A local file is durable on return (file and folder are synced). A remote one is one put, which is atomic
    and durable on object stores; on file-like remotes (sftp, say) it is neither.

    Raises:
        EnvironmentFault: disk full, access denied, no such bucket, a name that cannot be a file; an error that did not
            pass within the retries.
    """

    def write() -> None:
        if is_local(url):
            write_file(os.path.abspath(local_path(url)), *parts)
            return
        system, path = filesystem(url)
        system.pipe_file(path, b"".join(parts))

    retried(write, url, "writing", writing=True)


def make_dirs(url: str) -> None:
    """Create a folder and those above it, durably; one that exists is fine. Object stores need none, and get none.

    Raises:
        EnvironmentFault: disk full, access denied, a file where a folder is needed; an error that did not pass.
    """
    if not is_local(url) and is_object_store(url):
        return

    def make() -> None:
        if is_local(url):
            make_local_dirs(os.path.abspath(local_path(url)))
            return
        system, path = filesystem(url)
        system.makedirs(path, exist_ok=True)

    retried(make, url, "creating the folder", writing=True)


def exists(url: str) -> bool:
    """Whether a file or folder of that name is there.

    Raises:
        EnvironmentFault: access denied, or the store does not answer.
        OSError: another error that did not pass within the retries.
    """

    def look() -> bool:
        if is_local(url):
            return os.path.exists(local_path(url))
        system, path = filesystem(url)
        return bool(system.exists(path))

    return retried(look, url, "looking up")


def remove(url: str) -> None:
    """Remove a file; one that is not there is fine. Raises what :func:`write_atomic` raises."""

    def unlink() -> None:
        with suppress(FileNotFoundError):
            if is_local(url):
                os.unlink(local_path(url))
            else:
                system, path = filesystem(url)
                system.rm_file(path)

    retried(unlink, url, "removing", writing=True)


def list_files(url: str) -> list[str]:
    """Names of all files below a folder, relative to it, sorted; [] where there is no such folder.

    Files that are still being written (or were, when their writer died) and lock files are left out.

    Raises:
        EnvironmentFault: access denied, or the store does not answer.
        OSError: another error that did not pass within the retries.
    """

    def names() -> list[str]:
        if is_local(url):
            return list(walk(local_path(url)))
        system, path = filesystem(url)
        root = path.rstrip("/") + "/"
        try:
            return [name.removeprefix(root) for name in system.find(path) if name.startswith(root)]
        except FileNotFoundError:
            return []

    return sorted(name for name in retried(names, url, "listing") if not _is_passing(name))


def _is_passing(name: str) -> bool:
    base = name.rpartition("/")[2]
    return name.endswith(TEMPORARY) or (base.startswith(".") and base.endswith(LOCK))


def fetch(url: str, start: int, stop: int, read: RangeReader = read_range) -> bytes:
    """Bytes ``start`` to ``stop`` of an input that was that long when it was indexed, retried by reopening.

    Raises:
        InputChangedError: the file is gone or has become shorter since it was indexed.
        EnvironmentFault: access denied, or the store does not answer.
        OSError: it cannot be read, after retries.
    """

    def attempt() -> bytes:
        try:
            return read(url, start, stop)
        except EOFError as error:
            size = stat(url).size
            if size < stop:
                raise InputChangedError(
                    f"{url} has {size} bytes where {stop} are needed: it became shorter since it was "
                    "indexed, and was probably replaced. Run the job again, so that its plan is made from "
                    "the file as it is now"
                ) from error
            raise OSError(errno.EAGAIN, f"the connection ended early: {error}") from error

    try:
        return retried(attempt, url, f"reading bytes {start} to {stop} of")
    except FileNotFoundError as error:
        raise InputChangedError(
            f"{url} is gone since it was indexed; put it back, or run the job again, so that its plan leaves it out"
        ) from error

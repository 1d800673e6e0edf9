"""Local files through the operating system directly: writes are durable, and a ranged read costs one system call."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.inputs.remote import local_path

__all__ = [
    "LOCK",
    "TEMPORARY",
    "durable_file",
    "make_local_dirs",
    "read_file",
    "read_file_range",
    "sync_file",
    "temporary_beside",
    "walk",
    "write_file",
]


# The same ending zarr gives to what it has not yet renamed into place, so that one rule hides both.
TEMPORARY = ".partial"
LOCK = ".lock"


def read_file(path: str) -> bytes:
    """The whole of a file."""
    with open(path, "rb") as stream:
        return stream.read()


def read_file_range(path: str, start: int, count: int) -> bytes:
    """``count`` bytes from ``start``, fewer at the end of the file."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        data = os.pread(descriptor, count, start)
        # Linux gives at most 2 GiB a call, network file systems less.
        while 0 < len(data) < count and (more := os.pread(descriptor, count - len(data), start + len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def write_file(path: str, *parts: bytes) -> None:
    """Write a file so that readers see the old one or the new one, durably; ``path`` is absolute."""
    with durable_file(path, *parts) as temporary:
        os.replace(temporary, path)


@contextmanager
def durable_file(path: str, *parts: bytes) -> Iterator[str]:
    """A temporary file beside ``path`` with these bytes, durable, for the caller to give the name to.

    What is left of it at the end is removed; the folder, which is made as needed, is durable then.
    """
    folder = os.path.dirname(path)
    make_local_dirs(folder)
    with temporary_beside(path) as temporary:
        with open(temporary, "xb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    sync_file(folder)


@contextmanager
def temporary_beside(path: str) -> Iterator[str]:
    """The name of a file that is to be written beside ``path``, for the caller to give the name to when it is whole.

    What is left of it at the end is removed.
    """
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def sync_file(path: str) -> None:
    """Make a local file's bytes, or a local folder's entries, durable."""
    descriptor = os.open(local_path(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_local_dirs(path: str) -> None:
    """Make a folder and those above it, durably; one that exists is fine. ``path`` is absolute."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        os.makedirs(folder, exist_ok=True)
        sync_file(os.path.dirname(folder))


def walk(root: str) -> Iterator[str]:
    """Names of all files below a folder, relative to it; none where there is no such folder."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, files in os.walk(root, onerror=fail):
        below = os.path.relpath(folder, root)
        yield from (name if below == os.curdir else f"{below}/{name}".replace(os.sep, "/") for name in files)

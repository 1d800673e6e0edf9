"""Size and version of a file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.inputs.remote import filesystem, is_local, local_path
from pipeline.inputs.retry import retried

__all__ = ["FileStat", "stat", "stat_of"]


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


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file's size in bytes, and a text that changes when it is rewritten ('' where the store has none)."""

    size: int
    stamp: str


def stat(url: str) -> FileStat:
    """Size and stamp of a file, with retries.

    Raises:
        FileNotFoundError: there is none.
        EnvironmentFault: access denied.
        InputError: the server gives no size.
        OSError: an error that did not pass within the retries.
    """
    return retried(lambda: _stat(url), url, "looking up")


def _stat(url: str) -> FileStat:
    if is_local(url):
        entry = os.stat(local_path(url))
        return FileStat(entry.st_size, str(entry.st_mtime_ns))
    system, path = filesystem(url)
    return stat_of(system.info(path), url)


def stat_of(info: Mapping[str, Any], url: str) -> FileStat:
    """Size and stamp from what fsspec tells of a remote file.

    Raises:
        InputError: it gives no size.
    """
    if info.get("size") is None:
        raise InputError(f"{url}: the server gives no size, so ranges cannot be planned; copy the file to a store")
    return FileStat(int(info["size"]), next((str(info[name]) for name in _STAMPS if info.get(name)), ""))

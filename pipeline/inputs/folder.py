"""Files below a folder, local or remote, with size and stamp."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.inputs import storage
from pipeline.inputs.file_stat import stat_of
from pipeline.inputs.remote import filesystem
from pipeline.inputs.retry import retried
from pipeline.inputs.tar import Member, is_system_file
from pipeline.redaction import redact

__all__ = ["FoundFile", "list_folder", "look_up"]


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file: its name relative to the folder or list that it was found by, where it lies, size in bytes, stamp."""

    name: str
    url: str
    size: int
    stamp: str

    def member(self, ext: str) -> Member:
        """The file as a member of a sample, of this extension."""
        return Member(ext, 0, self.size, 0, self.url, self.stamp)


def list_folder(folder: str) -> list[FoundFile]:
    """All files below a folder, sorted by name; hidden ones and what operating systems leave behind are left out.

    Raises:
        InputError: there is no such folder.
        EnvironmentFault: it may not be read.
    """
    _check_plain(folder)
    if storage.is_local(folder):
        root = os.path.abspath(storage.local_path(folder))
        if not os.path.isdir(root):
            raise InputError(f"there is no folder of images at {folder}; check the path")
        files = list(_walk(root))
    else:
        system, path = filesystem(folder)
        entries = retried(lambda: system.find(path, detail=True), folder, "listing")
        root = path.rstrip("/") + "/"
        files = []
        for name, entry in entries.items():
            if name.startswith(root) and entry.get("type") != "directory":
                below = name.removeprefix(root)
                state = stat_of(entry, name)
                files.append(FoundFile(below, storage.join(folder, below), state.size, state.stamp))
        if not files:
            raise InputError(f"there is no file below {folder}; check the URL")
    return sorted((file for file in files if not _is_hidden(file.name)), key=lambda file: file.name)


def _check_plain(url: str) -> None:
    """Refuse a URL with a password or a signature, as the places of images are stored."""
    if not storage.is_local(url) and redact(url) != url:
        raise InputError(
            f"{redact(url)}: a URL with a user or a query may hold a password or a signature, and the places of images "
            "are stored; give plain URLs, with credentials where fsspec looks for them, or tars"
        )


def _walk(root: str) -> Iterator[FoundFile]:
    """Files below a local folder; links to folders are followed, each folder once."""
    visited = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in visited:
                visited.add(real)
                kept.append(name)
        folders[:] = kept
        for name in names:
            path = os.path.join(folder, name)
            try:
                path.encode()
                state = os.stat(path)
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{path!r} has a name that is not UTF-8; rename it, as it is a key in the store"
                ) from error
            except FileNotFoundError:
                continue  # a link that leads nowhere, or a file that went away
            yield FoundFile(os.path.relpath(path, root), path, state.st_size, str(state.st_mtime_ns))


def _raise(error: OSError) -> None:
    raise error


def _is_hidden(name: str) -> bool:
    return is_system_file(name) or any(part.startswith(".") for part in name.split("/"))


def look_up(place: str, folder: str) -> FoundFile:
    """A file that is named by its path or URL, relative to ``folder``.

    Raises:
        InputError: there is none, or its URL has a query, which could not be stored.
    """
    _check_plain(place)
    url = (
        place
        if not storage.is_local(place) or os.path.isabs(storage.local_path(place))
        else storage.join(folder, place)
    )
    if storage.is_local(url):
        url = os.path.abspath(storage.local_path(url))
    try:
        state = storage.stat(url)
        if storage.is_local(url) and not os.path.isfile(storage.local_path(url)):
            raise InputError(f"{url} is named as an image or label, and is no file; check the path")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {url}, which is named as an image or label; check the path") from error
    base = os.path.abspath(storage.local_path(folder)) if storage.is_local(folder) else folder.rstrip("/")
    name = url.removeprefix(base + "/").partition("://")[2] if "://" in url and not url.startswith(base + "/") else url
    return FoundFile(name.removeprefix(base + "/").lstrip("/"), url, state.size, state.stamp)

"""Files that a writer began and did not finish, because it was killed."""

import os
import time
from collections.abc import Iterator
from typing import Any

from pipeline.inputs import storage
from pipeline.inputs.local import TEMPORARY
from pipeline.inputs.remote import filesystem

__all__ = ["find_leftovers", "remove_leftovers"]

# A lease is renewed beside the arrays and the ledger, so that a file there may be one that is being written right now.
_BEING_WRITTEN_SECONDS = 60.0


def find_leftovers(out: str) -> list[str]:
    """The places of such files anywhere in a store, sorted; of its own folder only those older than a minute."""
    return sorted(
        place
        for folder, name in _files(out)
        if name.endswith(TEMPORARY) and not _is_being_written(out, place := storage.join(folder, name))
    )


def remove_leftovers(out: str) -> list[str]:
    """Remove them, where nobody writes but the caller; returns their places.

    Only local folders have any: an object store shows a file when it is whole. Those are not listed, as listing them
    costs a request for every thousand files.
    """
    if not storage.is_local(out):
        return []
    places = find_leftovers(out)
    for place in places:
        storage.remove(place)
    return places


def _is_being_written(out: str, place: str) -> bool:
    if not storage.is_local(out) or os.path.dirname(place) != storage.local_path(out).rstrip("/"):
        return False
    try:
        return time.time() - os.stat(place).st_mtime < _BEING_WRITTEN_SECONDS
    except FileNotFoundError:
        return True


def _files(out: str) -> Iterator[tuple[str, str]]:
    if storage.is_local(out):
        for folder, _, names in os.walk(storage.local_path(out)):
            yield from ((folder, name) for name in names)
        return
    system, path = filesystem(out)
    walk: Iterator[tuple[str, Any, Any]] = system.walk(path)
    for folder, _, names in walk:
        yield from ((system.unstrip_protocol(folder), name) for name in names)

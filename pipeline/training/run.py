"""The record of a training run, ``OUT/plan/run.json``: the options, input and weights it was begun with."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.errors import StoreError, StoreFormatError, StoreMismatchError
from pipeline.inputs import storage
from pipeline.store.layout import list_differences

__all__ = ["check_run", "record_run"]


_FORMAT = "featup-training-run"
# Raised where a run that an older program began cannot be gone on with: version 3 has another loss and dropout.
_FORMAT_VERSION = 3


def check_run(out: str, identity: Mapping[str, Any]) -> None:
    """Refuse the folder of another run before anything in it is touched; a folder without a run passes.

    Args:
        out: The run's folder or URL.
        identity: What must be the same, as far as it is known yet.

    Raises:
        StoreMismatchError: the run there has another identity; the text lists the differences.
        StoreFormatError: a program of another version began it.
        StoreError: its record is damaged.
    """
    place = _place(out)
    if not storage.exists(place):
        return
    try:
        record = json.loads(storage.read_bytes(place))
        version = (record["format"], record.get("format_version", 1))
        recorded = record["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{place} is not the record of a training run ({type(error).__name__}: {error}): it is damaged; restore "
            "it, or start anew in another --out"
        ) from error
    if version != (_FORMAT, _FORMAT_VERSION):
        raise StoreFormatError(
            f"{out} holds a training run of format {version[0]}, version {version[1]}; this program goes on with "
            f"{_FORMAT}, version {_FORMAT_VERSION}: finish the run with the program that began it, or start anew in "
            "another --out"
        )
    differences = list_differences({name: recorded.get(name) for name in identity}, identity)
    if differences:
        raise StoreMismatchError(
            f"{out} was begun with other options, input or weights:\n  " + "\n  ".join(differences) + "\n"
            "Finish it with those it was begun with, or give another --out."
        )


def record_run(out: str, provenance: Mapping[str, Any]) -> None:
    """Write what a run is: ``provenance`` has its identity, config, backbone and versions."""
    record = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **provenance}
    storage.write_atomic(_place(out), json.dumps(record).encode())


def _place(out: str) -> str:
    return storage.join(out, "plan", "run.json")

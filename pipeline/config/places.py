"""Files and folders that options name, looked for before anything is imported that takes seconds."""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from pipeline.config.evaluate import row_file
from pipeline.errors import EnvironmentFault, InputError
from pipeline.inputs import storage
from pipeline.inputs.patterns import expand

__all__ = ["check_places"]


def _after_equals(text: str) -> str:
    return text.partition("=")[2]


# Options of which only a part is a place, and the function that gives it.
_NAMED: dict[str, Callable[[str], str]] = {
    "also_backbones": _after_equals,
    "label_dir": _after_equals,
    "rows": row_file,
}
# What is no file.
_KINDS = {
    "label_dir": "folder",
    "images": "file or folder",
    "pca_from": "store",
    "store": "store",
    "val_store": "store",
}


def check_places(config: Any) -> None:
    """Look for what the options name on this machine; what lies behind URLs is left to who reads it.

    A tar that is named and missing is no error: it is listed, and the others are used.

    Args:
        config: a dataclass of options; those that are a path, or have one in them, are looked at, and ``out`` is where
            results go.

    Raises:
        InputError: a file or folder that is not there, or a pattern that nothing matches.
        EnvironmentFault: one that may not be read, or no folder that may be written to.
    """
    for one in fields(config):
        value = getattr(config, one.name)
        if not (one.metadata.get("path") or one.name in _NAMED) or value is None:
            continue
        if one.name == "out":
            _check_output(value)
            continue
        for text in value if isinstance(value, tuple) else (value,):
            place = _NAMED[one.name](text) if one.name in _NAMED else text
            if not place or not storage.is_local(place):
                continue
            if isinstance(value, tuple) and one.name not in (*_NAMED, "images"):
                expand([place])
            else:
                _check_input(one.name, place)


def _check_input(name: str, place: str) -> None:
    path, kind = storage.local_path(place), _KINDS.get(name, "file")
    if not os.path.exists(os.path.join(path, "features.zarr") if kind == "store" else path):
        raise InputError(f"{name}: there is no {kind} at {place}; check the path, and whether it lies on this machine")
    if not os.access(path, os.R_OK):
        raise EnvironmentFault(f"{name}: {place} may not be read by this user; change its permissions")


def _check_output(place: str) -> None:
    if not storage.is_local(place):
        return
    folder = os.path.abspath(storage.local_path(place))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK):
        raise EnvironmentFault(
            f"out: {place} cannot be written, as {folder} is read-only or belongs to another user; give another place"
        )

"""Dataclasses from stored values, of this version of the format and of older ones."""

from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any, TypeVar, cast

from pipeline.errors import StoreFormatError

__all__ = ["read_fields"]

T = TypeVar("T")


@lru_cache(maxsize=64)
def _names(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names of all fields of a dataclass, and of those without a default."""
    known = [one for one in fields(kind) if one.init]
    required = [one.name for one in known if one.default is MISSING and one.default_factory is MISSING]
    return frozenset(one.name for one in known), frozenset(required)


def read_fields(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """A dataclass from its stored fields: those that an older program did not write get their defaults.

    Lists become tuples, as JSON has none.

    Args:
        kind: the dataclass.
        values: its fields by name.
        what: names the values in the error text.

    Raises:
        StoreFormatError: a field that ``kind`` does not have, or one that it must have is missing.
    """
    known, required = _names(cast(Hashable, kind))
    if not values.keys() <= known:
        raise StoreFormatError(
            f"{what} has {sorted(values.keys() - known)}, which this program does not know: it was written by a newer "
            "version, or is damaged; update this program"
        )
    if not required <= values.keys():
        raise StoreFormatError(f"{what} lacks {sorted(required - values.keys())}: it is damaged; restore it")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

"""What a column of a table holds, whichever of Arrow's types for it the program chose that wrote the table."""

import pyarrow as pa
import pyarrow.types as pt

__all__ = ["is_bytes", "is_text", "is_whole"]


def is_text(kind: pa.DataType) -> bool:
    """Texts; polars and pandas 3 write large ones, categories are dictionaries of them."""
    value = _value(kind)
    return bool(pt.is_string(value) or pt.is_large_string(value) or pt.is_string_view(value))


def is_whole(kind: pa.DataType) -> bool:
    """Whole numbers, also in a dictionary."""
    return bool(pt.is_integer(_value(kind)))


def is_bytes(kind: pa.DataType) -> bool:
    """Bytes of any length."""
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))


def _value(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pt.is_dictionary(kind) else kind

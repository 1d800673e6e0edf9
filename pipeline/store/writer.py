"""Writes whole units into a store."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey
from pipeline.store.layout import AnyArray, Layout, open_arrays
from pipeline.store.shard import encode_chunk, encode_shard

__all__ = ["StoreWriter", "round_mantissa", "row_checksum"]


_CHECKSUM_BYTES = 1 << 18


def row_checksum(row: NDArray[Any]) -> int:
    """crc32c of one row's bytes, in C order, little-endian."""
    flat = row.reshape(-1).view(np.uint8)
    checksum = 0
    for start in range(0, len(flat), _CHECKSUM_BYTES):  # the library takes bytes alone: copies, so small ones
        checksum = google_crc32c.extend(checksum, flat[start : start + _CHECKSUM_BYTES].tobytes())
    return int(checksum)


def round_mantissa(block: NDArray[np.float16], bits: int) -> None:
    """Round float16 values, in place, to ``bits`` of their 10 mantissa bits, half to even; NaN and infinity stay.

    Values that would round beyond the largest number keep their bits. Decoding needs nothing; rounded values just
    compress better.
    """
    drop = 10 - bits
    if not drop:
        return
    raw = block.view(np.uint16)
    half = np.uint16((1 << (drop - 1)) - 1)
    odd = (raw >> np.uint16(drop)) & np.uint16(1)
    rounded = (raw + half + odd) & np.uint16(0xFFFF & ~((1 << drop) - 1))
    # Both: the payload of a NaN can carry into the sign, and a large number can round to infinity.
    finite = ((raw & np.uint16(0x7C00)) != 0x7C00) & ((rounded & np.uint16(0x7C00)) != 0x7C00)
    np.copyto(raw, rounded, where=finite)


class StoreWriter:
    """Writes whole units into an existing store."""

    def __init__(self, url: str, layout: Layout, threads: int = 1) -> None:
        """
        Args:
            threads: how many chunks are encoded at once.
        """
        self.url = url
        self.layout = layout
        self._arrays = open_arrays(url, [spec.name for spec in layout.arrays])
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def write(self, key: UnitKey, blocks: Mapping[str, NDArray[Any]]) -> int:
        """Write one unit, every object of it atomically, and make it durable.

        Args:
            key: the unit; its rows begin a shard.
            blocks: for every array ``[rows_per_shard, ...]``, fill values in rows that hold no sample.

        Returns:
            Bytes stored, after compression.

        Raises:
            StoreError: the blocks are not whole shards of this store.
        """
        rows = self.layout.rows_per_shard
        if key.row % rows or key.row >= self.layout.rows or set(blocks) != set(self._arrays):
            raise StoreError(
                f"{key}: writing {sorted(blocks)} at row {key.row}; a unit begins a shard of {rows} rows, below row "
                f"{self.layout.rows}, and has all of {sorted(self._arrays)}"
            )
        for spec in self.layout.arrays:
            block = blocks[spec.name]
            if block.shape != (rows, *spec.row_shape) or block.dtype != spec.dtype:
                raise StoreError(
                    f"{key}: {spec.name} is {block.dtype} {block.shape}, the store takes {spec.dtype} "
                    f"{(rows, *spec.row_shape)}"
                )
        stored, (codec, level) = 0, self.layout.blosc
        for spec in self.layout.arrays:
            block, array = blocks[spec.name], self._arrays[spec.name]
            place = storage.join(self.url, "features.zarr", spec.name, chunk_key(array, key.row // rows))
            # Rows of one number each are one chunk, which is encoded like a chunk of a shard and stands alone.
            if spec.row_shape:
                parts = encode_shard(block, spec.chunk, spec.fill, codec, level, self._pool)
            else:
                parts = encode_chunk(block, spec.fill, codec, level)
            if parts:
                storage.write_atomic(place, *parts)
                stored += sum(map(len, parts))
            else:
                storage.remove(place)
        return stored


def chunk_key(array: AnyArray, shard: int) -> str:
    """Name of the object that holds shard ``shard`` of an array's rows, below the array."""
    encoding = cast(Any, array.metadata).chunk_key_encoding
    return cast(str, encoding.encode_chunk_key((shard,) + (0,) * (array.ndim - 1)))

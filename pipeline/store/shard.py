"""Encodes one shard of a Zarr v3 array, its chunks in parallel.

zarr-python encodes the chunks of a shard one after the other (0.2 GB/s here), which would leave an accelerator
waiting; the format is simple: encoded chunks one behind the other, then an index of (offset, length) for each, then the
index's crc32c (Zarr v3, sharding-indexed codec, version 1.0). The compressor and the checksum are the libraries'.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import google_crc32c
import numpy as np
import torch
from numcodecs import blosc
from numpy.typing import NDArray

__all__ = ["encode_chunk", "encode_shard"]


_MISSING = 2**64 - 1  # in the index, for a chunk that holds nothing but fill values


def encode_shard(
    block: NDArray[Any], chunk: tuple[int, ...], fill: float, codec: str, level: int, pool: Executor
) -> list[bytes]:
    """The bytes of a shard, in parts: chunks through blosc (bit-shuffled) and crc32c, index at the end.

    Args:
        block: ``[rows, ...]``, all rows of the shard. Sides that are no multiple of the chunk's are filled up.
        chunk: shape of a chunk within a row; a chunk holds one row.
        fill: the array's fill value; chunks of nothing else are left out.
        codec: blosc's name of it.
        level: blosc's.
        pool: threads that encode chunks.

    Returns:
        The shard's parts in order, none where every chunk is left out and there is no object to write. They are not
        joined: with other threads waiting for Python's lock, copying a shard once more is dear.
    """
    encoded = list(pool.map(lambda part: encode_chunk(part, fill, codec, level), _chunks(block, chunk, fill)))
    lengths = np.array([sum(map(len, parts)) for parts in encoded], dtype=np.uint64)
    if not lengths.any():
        return []
    index = np.empty((len(encoded), 2), dtype="<u8")
    index[:, 0] = np.cumsum(lengths) - lengths
    index[:, 1] = lengths
    index[lengths == 0] = _MISSING
    table = index.tobytes()
    return [*itertools.chain.from_iterable(encoded), table, _crc(table)]


def _chunks(block: NDArray[Any], chunk: tuple[int, ...], fill: float) -> Iterator[NDArray[Any]]:
    """Chunks in the index's order: rows outermost, then the dimensions of a row in C order."""
    starts = [range(0, side, step) for side, step in zip(block.shape[1:], chunk, strict=True)]
    for row in block:
        for corner in itertools.product(*starts):
            part = row[tuple(slice(start, start + step) for start, step in zip(corner, chunk, strict=True))]
            if part.shape != chunk:
                whole = np.full(chunk, fill, block.dtype)
                whole[tuple(slice(0, side) for side in part.shape)] = part
                part = whole
            yield part


def encode_chunk(part: NDArray[Any], fill: float, codec: str, level: int) -> list[bytes]:
    """One chunk through blosc (bit-shuffled) and crc32c, in parts; none where it holds fill values alone."""
    # Most chunks differ in their first value already, and are then not looked through.
    first = part.flat[0]
    if (first == fill or (first != first and fill != fill)) and _is_fill(part, fill):
        return []
    # torch copies without holding Python's lock, numpy holds it; it has no type for uint16, which int16 stands in for.
    same = part.view(np.int16) if part.dtype == np.uint16 else part
    packed = torch.from_numpy(same).contiguous().numpy()
    data: bytes = blosc.compress(packed, codec.encode(), level, blosc.BITSHUFFLE)
    return [data, _crc(data)]


def _is_fill(part: NDArray[Any], fill: float) -> bool:
    return bool(np.isnan(part).all() if fill != fill else (part == fill).all())


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")

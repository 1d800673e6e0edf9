"""Reads rows, or windows of rows, straight from the shards that :mod:`pipeline.store.shard` writes.

zarr-python spends more time on arranging the read of a tile than the tile takes to decode. Here a chunk is one read,
one checksum, one decompression, and one copy to where its values belong, which also converts their type.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numcodecs import blosc
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import StoreError, StoreFormatError
from pipeline.inputs import storage
from pipeline.store.layout import AnyArray, ArraySpec
from pipeline.store.open_shards import CRC_BYTES, Bytes, DamagedShardError, OpenShard, OpenShards, Source, is_intact

__all__ = ["ArrayReader", "Window"]

Window: TypeAlias = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""
_MISSING = 2**64 - 1


@dataclass
class ArrayReader:
    """One array of a store, for one process and one thread of it at a time."""

    store: str
    spec: ArraySpec
    rows_per_shard: int
    _key: Callable[[int], str]
    _shards: OpenShards
    # What was read last; memory that is used again has no pages to be mapped.
    _buffer: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))

    @staticmethod
    def of(
        store: str, array: AnyArray, spec: ArraySpec, rows_per_shard: int, shards: OpenShards | None = None
    ) -> "ArrayReader":
        """The reader of an array.

        Args:
            store: the folder or URL that was ``--out``.
            array: the array, as zarr-python opens it.
            spec: what the store's layout says of it.
            rows_per_shard: of the store.
            shards: those that are open, of all readers of the store; by default of this one.

        Raises:
            StoreFormatError: the array is not encoded as this program does it.
        """
        metadata = cast(Any, array.metadata)
        codecs = [codec.to_dict() for codec in metadata.codecs]
        inner = codecs
        if spec.row_shape and [codec["name"] for codec in codecs] == ["sharding_indexed"]:
            sharding = codecs[0]["configuration"]
            inner = [codec if isinstance(codec, dict) else codec.to_dict() for codec in sharding["codecs"]]
        names = [codec["name"] for codec in inner]
        # Of single bytes the order does not matter, and is not said.
        little = inner[0].get("configuration", {}).get("endian", "little") == "little"
        chunk = tuple(array.chunks)
        wanted = (1, *spec.chunk) if spec.row_shape else (rows_per_shard,)
        if names != ["bytes", "blosc", "crc32c"] or not little or chunk != wanted:
            raise StoreFormatError(
                f"{store}: the array {spec.name} has chunks of {chunk}, encoded by {names}, where its layout says "
                f"{wanted} by bytes, blosc, crc32c: another program wrote it; read it by zarr.open"
            )
        key = partial(_chunk_key, metadata.chunk_key_encoding, array.ndim)
        return ArrayReader(store, spec, rows_per_shard, key, shards or OpenShards())

    def copy(self) -> "ArrayReader":
        """A reader of the same array for another thread."""
        return ArrayReader(self.store, self.spec, self.rows_per_shard, self._key, self._shards)

    def read(self, row: int, out: Tensor, window: Window | None = None, mirrored: bool = False) -> None:
        """Read one row, or a window of it.

        Args:
            row: in the store.
            out: is filled, and decides the type: ``[height, width, ...]`` of the window, or the row's own shape.
            window: of arrays with pixels; the whole row by default. Only the tiles it touches are read.
            mirrored: left to right.

        Raises:
            StoreError: the shard or a chunk is damaged; features are missing.
            OSError: it cannot be read.
        """
        number, offset = divmod(row, self.rows_per_shard)
        for last in (False, True):
            try:
                return self._read(number, offset, out, window, mirrored)
            except DamagedShardError as error:
                # An object that was replaced since its index was read is looked at once more.
                self._shards.drop(self._place(number))
                if last:
                    raise StoreError(
                        f"{self._place(number)}, row {row}: {error}: the store is damaged; featup verify {self.store} "
                        "--repair, then run the job that made it again"
                    ) from error

    def _read(self, number: int, offset: int, out: Tensor, window: Window | None, mirrored: bool) -> None:
        grid = [-(-side // chunk) for side, chunk in zip(self.spec.row_shape, self.spec.chunk, strict=True)]
        shape = (self.rows_per_shard, *grid) if grid else None
        shard = self._shards.get(self._place(number), shape)
        if not self.spec.row_shape:
            out.fill_(self._all_of(shard)[offset].item())
            return
        tile = self.spec.chunk
        top, left, height, width = window or (0, 0, *self.spec.row_shape[:2])
        tiles = [
            (y, x)
            for y in range(top // tile[0], -(-(top + height) // tile[0]))
            for x in range(left // tile[1], -(-(left + width) // tile[1]))
        ]
        count = prod(tile)
        for (tile_y, tile_x), chunk in zip(tiles, self._chunks(shard, offset, tiles), strict=True):
            y, x = tile_y * tile[0], tile_x * tile[1]
            # What the tile and the window have in common, in pixels of the row.
            y0, x0 = max(y, top), max(x, left)
            y1, x1 = min(y + tile[0], top + height), min(x + tile[1], left + width)
            first = left + width - x1 if mirrored else x0 - left
            target = out[y0 - top : y1 - top, first : first + x1 - x0]
            if chunk is None:
                target.fill_(self.spec.fill)
                continue
            values = torch.from_numpy(self._decode(chunk, count).reshape(tile)[y0 - y : y1 - y, x0 - x : x1 - x])
            if mirrored and values.dtype == torch.uint16:  # which torch does not flip
                values = values.view(torch.int16).flip(1).view(torch.uint16)
            elif mirrored:
                values = values.flip(1)
            target.copy_(values)

    def _chunks(self, shard: OpenShard | None, offset: int, tiles: list[tuple[int, int]]) -> list[Bytes | None]:
        """The encoded chunk of each tile of a row, valid until the next read; ``None`` where there is none."""
        if shard is None or shard.index is None:
            chunks: list[Bytes | None] = [None] * len(tiles)
        else:
            # All channels are in one chunk.
            grid = shard.index[offset].reshape(*shard.index.shape[1:3], 2)
            entries = [grid[tile].tolist() for tile in tiles]
            spans = [(start, start + length) for start, length in entries if start != _MISSING]
            found = iter(self._fetch(shard.source, spans))
            chunks = [None if start == _MISSING else next(found) for start, _ in entries]
        if self.spec.name == "features" and any(chunk is None for chunk in chunks):
            raise DamagedShardError("a chunk of the features of a good sample is missing")
        return chunks

    def _fetch(self, source: Source, spans: list[tuple[int, int]]) -> list[Bytes]:
        """The bytes of spans (start, stop); those near each other by one call."""
        if any(stop > source.size for _, stop in spans):
            raise DamagedShardError("its index points beyond its end")
        groups: list[tuple[int, int]] = []
        for start, stop in sorted(spans):
            if groups and start - groups[-1][1] <= source.gap:
                groups[-1] = (groups[-1][0], max(stop, groups[-1][1]))
            else:
                groups.append((start, stop))
        total = sum(stop - start for start, stop in groups)
        if len(self._buffer) < total:
            self._buffer = np.empty(total, np.uint8)
        # Where a byte of the shard is in the buffer: less this, for bytes from the group's start on.
        shifts: list[tuple[int, int]] = []
        filled = 0
        for start, stop in groups:
            source.read_into(self._buffer[filled : filled + stop - start], start)
            shifts.append((start, start - filled))
            filled += stop - start
        shift_of = {start: shifts[bisect_right(shifts, (start, sys.maxsize)) - 1][1] for start, _ in spans}
        return [self._buffer[start - shift_of[start] : stop - shift_of[start]] for start, stop in spans]

    def _all_of(self, shard: OpenShard | None) -> NDArray[Any]:
        """The values of a shard that is one chunk."""
        if shard is None:
            return np.full(self.rows_per_shard, self.spec.fill, self.spec.dtype)
        (chunk,) = self._fetch(shard.source, [(0, shard.source.size)])
        return self._decode(chunk, self.rows_per_shard)

    def _decode(self, chunk: Bytes, count: int) -> NDArray[Any]:
        if not is_intact(chunk):
            raise DamagedShardError("a chunk is not what was written (its checksum differs)")
        decoded = np.empty(count, self.spec.dtype)
        try:
            blosc.decompress(chunk[:-CRC_BYTES], decoded)
        except (RuntimeError, ValueError) as error:
            raise DamagedShardError(f"a chunk cannot be decoded ({error})") from error
        return decoded

    def _place(self, number: int) -> str:
        return storage.join(self.store, "features.zarr", self.spec.name, self._key(number))


def _chunk_key(encoding: Any, dimensions: int, shard: int) -> str:
    return cast(str, encoding.encode_chunk_key((shard,) + (0,) * (dimensions - 1)))

"""Permutations that are computed value by value, for orders too long to be held in memory."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from math import isqrt

__all__ = ["KeyedPermutation"]


# Of a Feistel network four make a permutation that no test of moderate length tells from a random one; twice as many
# also mix domains of a handful of values.
_ROUNDS = 8


@dataclass(frozen=True)
class KeyedPermutation:
    """A pseudo-random permutation of ``range(length)``, chosen by a key of whole numbers.

    Each value takes constant time and memory. A Feistel network over a grid of at least ``length`` cells (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002) adds in each round a keyed hash of one coordinate to the
    other, which maps the cells one to one. A cell past the end of the range is mapped again until a cell of the range
    comes out (cycle walking); the grid has less than ``sqrt(length) + 1`` such cells, so that this is rare.
    """

    length: int
    key: tuple[int, ...]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} of a permutation of {self.length}")
        cell = self._permute(position)
        while cell >= self.length:
            cell = self._permute(cell)
        return cell

    @cached_property
    def _grid(self) -> tuple[int, int]:
        height = isqrt(self.length - 1) + 1
        return height, -(-self.length // height)

    @cached_property
    def _hash_key(self) -> bytes:
        return blake2b(repr(self.key).encode()).digest()

    def _permute(self, cell: int) -> int:
        height, width = self._grid
        y, x = divmod(cell, width)
        for number in range(0, _ROUNDS, 2):
            y = (y + self._hash(number, x)) % height
            x = (x + self._hash(number + 1, y)) % width
        return y * width + x

    def _hash(self, number: int, coordinate: int) -> int:
        data = number.to_bytes(1) + coordinate.to_bytes(8)
        return int.from_bytes(blake2b(data, digest_size=8, key=self._hash_key).digest())

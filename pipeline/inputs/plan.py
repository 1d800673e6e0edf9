"""From shards to samples, rows and units of work: everything a run will do, known before it does anything.

A unit is one Zarr shard's worth of rows from one input shard. Every input shard begins on a unit boundary, so a
sample's row follows from the shards' sample counts alone and depends on neither the number nor the order of workers.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.inputs.patterns import expand
from pipeline.inputs.tar import IndexedSample, ShardIndex
from pipeline.inputs.tar_index import cached_index, saved_index

__all__ = ["Plan", "PlannedShard", "UnitKey", "make_plan", "plan_shard", "rows_of"]


@dataclass(frozen=True, order=True)
class UnitKey:
    """One unit of work: samples ``start`` to ``stop`` of input shard ``shard`` become rows ``row`` and following.

    ``unit`` is its number in the plan; ``row`` is ``unit * rows_per_shard``.
    """

    unit: int
    shard: int
    start: int
    stop: int
    row: int

    def __post_init__(self) -> None:
        if not (min(self.unit, self.shard, self.start, self.row) >= 0 and self.stop > self.start):
            raise InputError(f"{self!r}: numbers are not negative and a unit has at least one sample")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"unit {self.unit} (shard {self.shard}, samples {self.start}:{self.stop}, row {self.row})"


@dataclass(frozen=True)
class PlannedShard:
    """What planning keeps of one input shard: ``samples`` in it, of which the first ``used`` are in the plan.

    ``digest`` is :attr:`pipeline.inputs.tar.ShardIndex.digest`, which names the content wherever the shard lies.
    """

    url: str
    size: int
    stamp: str
    samples: int
    used: int
    faults: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Plan:
    """The shards in order, and the arithmetic from there to units and rows. Small: the samples stay in the indices."""

    shards: tuple[PlannedShard, ...]
    rows_per_shard: int
    index_dir: str

    @cached_property
    def _first_unit(self) -> NDArray[np.int64]:
        counts = [-(-shard.used // self.rows_per_shard) for shard in self.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def _first_sample(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum([shard.used for shard in self.shards], dtype=np.int64)])

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(self._first_unit[-1])

    @property
    def samples(self) -> int:
        """How many samples there are, those known to be lost included."""
        return int(self._first_sample[-1])

    @property
    def rows(self) -> int:
        """Length of the store's arrays: whole Zarr shards, with holes at the ends of input shards."""
        return self.units * self.rows_per_shard

    @property
    def faults(self) -> list[str]:
        """What is wrong with whole input shards."""
        return [f"{shard.url}: {fault}" for shard in self.shards for fault in shard.faults]

    @cached_property
    def digest(self) -> str:
        """Identity of the input and its rows: sha256 over each shard's content and sample count."""
        content = [[shard.digest, shard.samples, shard.used] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.rows_per_shard, content]).encode()).hexdigest()

    def unit(self, number: int) -> UnitKey:
        """The key of unit ``number``."""
        if not 0 <= number < self.units:
            raise InputError(f"unit {number} of a plan with {self.units} units")
        shard = int(np.searchsorted(self._first_unit, number, side="right")) - 1
        start = (number - int(self._first_unit[shard])) * self.rows_per_shard
        stop = min(start + self.rows_per_shard, self.shards[shard].used)
        return UnitKey(unit=number, shard=shard, start=start, stop=stop, row=number * self.rows_per_shard)

    def index(self, shard: int) -> ShardIndex:
        """The index of one input shard, as it was when the plan was made.

        Raises:
            InputError: there is no such index, or it is of another version of the shard.
        """
        planned = self.shards[shard]
        index = _remembered_index(planned, self.index_dir)
        if (index.size, len(index.samples)) != (planned.size, planned.samples):
            raise InputError(
                f"{planned.url}: {index.size} bytes with {len(index.samples)} samples now, {planned.size} bytes with "
                f"{planned.samples} samples when the plan was made; put the shard back, or start a new store"
            )
        return index

    def sample(self, number: int) -> tuple[int, int]:
        """(input shard, position in it) of sample ``number`` of the whole plan."""
        shard = int(np.searchsorted(self._first_sample, number, side="right")) - 1
        return shard, number - int(self._first_sample[shard])

    def unit_samples(self, key: UnitKey) -> Sequence[IndexedSample]:
        """The samples of one unit, in row order."""
        return self.index(key.shard).samples[key.start : key.stop]

    def to_json(self) -> bytes:
        """For keeping beside the store."""
        return json.dumps({"rows_per_shard": self.rows_per_shard, "shards": [asdict(s) for s in self.shards]}).encode()

    @staticmethod
    def from_json(data: bytes, index_dir: str) -> "Plan":
        """What :meth:`to_json` wrote."""
        content: dict[str, Any] = json.loads(data)
        shards = tuple(PlannedShard(**{**s, "faults": tuple(s["faults"])}) for s in content["shards"])
        return Plan(shards, content["rows_per_shard"], index_dir)


@lru_cache(maxsize=8)
def _remembered_index(shard: PlannedShard, index_dir: str) -> ShardIndex:
    return saved_index(shard.url, index_dir)


def plan_shard(url: str, index_dir: str) -> PlannedShard:
    """Index one input shard (or reuse its index) and keep what planning needs of it."""
    index = cached_index(url, index_dir)
    count = len(index.samples)
    return PlannedShard(url, index.size, index.stamp, count, count, index.faults, index.digest)


def make_plan(
    patterns: Iterable[str],
    index_dir: str,
    limit: int | None = None,
    index_all: Callable[[list[str], str], Iterator[PlannedShard]] | None = None,
) -> tuple[PlannedShard, ...]:
    """Resolve the shards and count their samples.

    Args:
        patterns: Paths or fsspec URLs with braces and globs.
        index_dir: Where the indices are kept; they are reused while a tar's size and time stamp stand.
        limit: Use only the first so many samples.
        index_all: Indexes many shards at once, in order; by default one after the other.

    Raises:
        InputError: nothing matches, or no shard holds a sample.
    """
    urls = expand(list(patterns))
    found = index_all(urls, index_dir) if index_all else (plan_shard(url, index_dir) for url in urls)
    left = limit
    shards = []
    for shard in found:
        used = shard.samples if left is None else min(left, shard.samples)
        left = None if left is None else left - used
        shards.append(PlannedShard(**{**asdict(shard), "used": used}))
    if not any(shard.used for shard in shards):
        faults = [f"{shard.url}: {fault}" for shard in shards for fault in shard.faults]
        raise InputError(
            f"{len(shards)} shards and not one sample: {'; '.join(faults[:5]) or 'they hold no named files'}; "
            "give tars in WebDataset format (KEY.jpg, KEY.cls, ...)"
        )
    return tuple(shards)


def rows_of(sample_bytes: int, wanted: int | None, target_bytes: int = 256 << 20) -> int:
    """Images in one Zarr shard: ``wanted``, or the largest power of two that keeps a shard below ``target_bytes``."""
    if wanted is not None:
        return wanted
    return int(1 << max(0, min(10, (target_bytes // max(1, sample_bytes)).bit_length() - 1)))

"""From shards to samples, rows and units of work: everything a run will do, known before it does anything.

A unit is one Zarr shard's worth of rows from one input shard. Every input shard begins on a unit boundary, so a
sample's row follows from the shards' sample counts alone and depends on neither the number nor the order of workers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import repeat
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.console import human_bytes
from pipeline.errors import ConfigError, InputChangedError, InputError
from pipeline.inputs import storage
from pipeline.inputs.manifest import is_manifest, manifest_place
from pipeline.inputs.patterns import expand
from pipeline.inputs.spread import spread_counts, spread_place
from pipeline.inputs.tar import IndexedSample, ShardIndex
from pipeline.inputs.tar_index import cached_index, saved_index
from pipeline.redaction import redact

__all__ = [
    "IndexAll",
    "Plan",
    "PlannedShard",
    "UnitKey",
    "check_samples",
    "index_shards",
    "limit_samples",
    "make_plan",
    "plan_shard",
    "rows_of",
]

_PARALLEL_INDEXING = 16


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
    """What planning keeps of one input shard: ``samples`` in it, of which ``used`` are in the plan.

    These are spread evenly over the shard; the first ones where ``spread`` is false, as they are in older plans.

    ``url`` may hold a signature, which workers need; where the plan is stored it is left out.
    ``digest`` is :attr:`pipeline.inputs.tar.ShardIndex.digest`, which names the content wherever the shard lies.
    ``ignored`` counts the members that are of no sample: (rule, how many).
    """

    url: str
    size: int
    stamp: str
    samples: int
    used: int
    faults: tuple[str, ...]
    digest: str
    ignored: tuple[tuple[str, int], ...] = ()
    spread: bool = False

    def choose(self, index: ShardIndex) -> ShardIndex:
        """The shard's index with the samples at the front that are in the plan, in their order."""
        if not self.spread:
            return index
        places = [spread_place(number, self.used, self.samples) for number in range(self.used)]
        # What a truncated tar says of its last sample is said of no other.
        faults = index.faults if places[-1] == self.samples - 1 else ()
        return replace(index, samples=tuple(index.samples[place] for place in places), faults=faults)


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
        return [redact(f"{shard.url}: {fault}") for shard in self.shards for fault in shard.faults]

    @property
    def ignored(self) -> tuple[tuple[str, int], ...]:
        """Members of all shards that are of no sample: (rule, how many), the most frequent first."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts.update(dict(shard.ignored))
        return tuple(counts.most_common())

    @cached_property
    def digest(self) -> str:
        """Identity of the input and its rows: sha256 over each shard's content and the samples of it that are used."""
        content = [
            [shard.digest, shard.samples, shard.used, *(["spread"] if shard.spread else [])] for shard in self.shards
        ]
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
        """The index of one input shard, as it was when the plan was made. One that was removed is made again.

        The ``used`` samples of the plan are its first ones, in the order of the shard.

        Raises:
            InputChangedError: it is of another version of the shard.
            InputError: there is no index, and the shard it could be made from is missing.
        """
        return _remembered_index(self.shards[shard], self.index_dir)

    def sample(self, number: int) -> tuple[int, int]:
        """(input shard, position in its :meth:`index`) of sample ``number`` of the whole plan."""
        shard = int(np.searchsorted(self._first_sample, number, side="right")) - 1
        return shard, number - int(self._first_sample[shard])

    def unit_samples(self, key: UnitKey) -> Sequence[IndexedSample]:
        """The samples of one unit, in row order."""
        return self.index(key.shard).samples[key.start : key.stop]

    def to_json(self) -> bytes:
        """For keeping beside the store, without credentials and signatures."""
        shards = [
            asdict(shard) | {"url": redact(shard.url), "faults": [redact(fault) for fault in shard.faults]}
            for shard in self.shards
        ]
        return json.dumps({"rows_per_shard": self.rows_per_shard, "shards": shards}).encode()

    @staticmethod
    def from_json(data: bytes, index_dir: str) -> "Plan":
        """The plan that :meth:`to_json` wrote. Its URLs have no signatures: ``update_plan`` gives them theirs."""
        content: dict[str, Any] = json.loads(data)
        shards = tuple(
            PlannedShard(
                **shard
                | {
                    # A store that was moved takes its manifests with it.
                    "url": manifest_place(shard["url"], index_dir),
                    "faults": tuple(shard["faults"]),
                    "ignored": tuple((rule, count) for rule, count in shard["ignored"]),
                }
            )
            for shard in content["shards"]
        )
        return Plan(shards, content["rows_per_shard"], index_dir)


@lru_cache(maxsize=8)
def _remembered_index(shard: PlannedShard, index_dir: str) -> ShardIndex:
    return shard.choose(_whole_index(shard, index_dir))


def _whole_index(shard: PlannedShard, index_dir: str) -> ShardIndex:
    try:
        index = saved_index(shard.url, index_dir)
    except InputError:
        index = cached_index(shard.url, index_dir)
        if index.size < 0:
            raise
    if _differs(index, shard):
        # The saved one may be of a version that was refused since, and the shard be the old one again.
        index = cached_index(shard.url, index_dir)
    if _differs(index, shard):
        raise InputChangedError(
            f"{shard.url}: {index.size} bytes with {len(index.samples)} samples now, {shard.size} bytes with "
            f"{shard.samples} samples when the plan was made (digest {index.digest[:8]} now, {shard.digest[:8]} then); "
            "put the shard back, or start a new store"
        )
    return index


def _differs(index: ShardIndex, shard: PlannedShard) -> bool:
    if is_manifest(shard.url):
        # Its own bytes change with the time stamps of the images that it lists.
        return (len(index.samples), index.digest) != (shard.samples, shard.digest)
    return (index.size, len(index.samples), index.digest) != (shard.size, shard.samples, shard.digest)


IndexAll: TypeAlias = Callable[[list[str], str], Iterator[PlannedShard]]
"""``index_all(urls, index_dir)`` gives the shards in order."""


def plan_shard(url: str, index_dir: str) -> PlannedShard:
    """Index one input shard (or reuse its index) and keep what planning needs of it."""
    index = cached_index(url, index_dir)
    count = len(index.samples)
    return PlannedShard(url, index.size, index.stamp, count, count, index.faults, index.digest, index.ignored)


def make_plan(
    patterns: Iterable[str],
    index_dir: str,
    limit: int | None = None,
    index_all: IndexAll | None = None,
) -> tuple[PlannedShard, ...]:
    """Resolve the shards and count their samples.

    Args:
        patterns: Paths or fsspec URLs with braces and globs.
        index_dir: Where the indices are kept; they are reused while a tar's size and time stamp stand.
        limit: Use only so many samples, spread evenly over all of them.
        index_all: Indexes many shards at once, in order; by default one after the other.

    Raises:
        InputError: nothing matches, or no shard holds a sample.
    """
    urls = expand(list(patterns))
    shards = limit_samples(index_shards(urls, index_dir, index_all), limit)
    check_samples(shards)
    return shards


def index_shards(urls: list[str], index_dir: str, index_all: IndexAll | None = None) -> Iterator[PlannedShard]:
    """Index shards, by ``index_all`` where it is given; in the order of ``urls``. Remote ones are read side by side."""
    if index_all is not None:
        yield from index_all(urls, index_dir)
    elif all(map(storage.is_local, urls)):
        yield from (plan_shard(url, index_dir) for url in urls)
    else:
        with ThreadPoolExecutor(_PARALLEL_INDEXING) as pool:
            yield from pool.map(plan_shard, urls, repeat(index_dir))


def limit_samples(shards: Iterable[PlannedShard], limit: int | None) -> tuple[PlannedShard, ...]:
    """The shards with ``limit`` samples in the plan, spread evenly over all of them; with all where it is None."""
    every = tuple(shards)
    totals = [shard.samples for shard in every]
    counts = totals if limit is None else spread_counts(totals, limit)
    return tuple(
        replace(shard, used=used, spread=0 < used < shard.samples) for shard, used in zip(every, counts, strict=True)
    )


def check_samples(shards: Sequence[PlannedShard]) -> None:
    """InputError where a plan has no sample at all."""
    if not any(shard.used for shard in shards):
        faults = [f"{shard.url}: {fault}" for shard in shards for fault in shard.faults]
        raise InputError(
            f"{len(shards)} shards and not one sample: {'; '.join(faults[:5]) or 'they hold no named files'}; "
            "give tars in WebDataset format (KEY.jpg, KEY.cls, ...)"
        )


def rows_of(
    sample_bytes: int,
    wanted: int | None,
    decoded_bytes: int = 0,
    target_bytes: int = 256 << 20,
    largest_decoded: int = 1 << 30,
) -> int:
    """Images in one Zarr shard, which are one unit of work.

    Args:
        sample_bytes: stored bytes of one sample, before compression.
        wanted: the user's choice; None for the largest power of two, up to 1024, that keeps both the stored and the
            decoded bytes of a unit below ``target_bytes``.
        decoded_bytes: bytes of one sample's decoded image and labels, as a unit holds them in memory.
        target_bytes: see ``wanted``.
        largest_decoded: decoded bytes of a unit that no choice may exceed.

    Raises:
        ConfigError: ``wanted`` images are too large to be decoded at once.
    """
    if wanted is None:
        return int(1 << max(0, min(10, (target_bytes // max(1, sample_bytes, decoded_bytes)).bit_length() - 1)))
    if wanted * decoded_bytes > largest_decoded:
        most = max(1, largest_decoded // decoded_bytes)
        raise ConfigError(
            f"rows_per_shard {wanted} makes units of {human_bytes(wanted * decoded_bytes)} of decoded images and "
            f"labels ({human_bytes(decoded_bytes)} each), more than {human_bytes(largest_decoded)}, which workers "
            f"could not hold; give {most} or less, or leave it out"
        )
    return wanted

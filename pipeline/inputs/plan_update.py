"""The plan of a store that is there, held against its input as it is now: grown, moved, or changed.

Rows and receipts of a store follow from the order of its shards and their sample counts. So the shards of the old plan
keep their place, whatever the input's order is now, and new ones come behind them.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest

from pipeline.errors import InputChangedError, InputError
from pipeline.inputs import storage
from pipeline.inputs.plan import IndexAll, Plan, PlannedShard, check_samples, index_shards, limit_samples
from pipeline.inputs.storage import FileStat
from pipeline.inputs.tar import ShardIndex
from pipeline.inputs.tar_index import index_name, load_saved, saved_index
from pipeline.redaction import redact

__all__ = ["PlanUpdate", "update_plan"]


_PARALLEL_LOOKUPS = 32
# The indices of so many shards are kept, to name the member that differs.
_MOST_DIFFERENCES = 16


@dataclass(frozen=True)
class PlanUpdate:
    """The shards of a plan, those of the old plan first and in its order.

    Attributes:
        shards: with the URLs, stamps and faults of now; which samples of old shards are used is as it was.
        to_recheck: positions of old shards of the same digest at another URL or with another stamp. The digest is of
            headers: before anything is added to the store, the bytes of finished units must be compared with their
            receipts (:func:`pipeline.inputs.changes.compare_bytes`).
        appended: how many shards are new; they are the last ones.
    """

    shards: tuple[PlannedShard, ...]
    to_recheck: tuple[int, ...]
    appended: int


def update_plan(
    old: Plan | None,
    urls: Sequence[str],
    index_dir: str,
    limit: int | None = None,
    index_all: IndexAll | None = None,
) -> PlanUpdate:
    """Hold the input against a store's plan.

    A shard whose URL (without its signature), size and stamp are those of the old plan is taken from there, by one look
    at the tar; neither the tar nor its index is opened. Others are indexed, and found again by their digest.

    Args:
        old: the plan beside the store; None for a new store.
        urls: the shards, expanded, in order.
        index_dir: where the indices are kept.
        limit: use only so many samples, spread evenly; those that old shards use count first, the others are of new
            ones.
        index_all: indexes many shards at once, in order; by default one after the other.

    Raises:
        InputChangedError: a shard has other content than the store was made from, with what differs.
        InputError: a shard that the store was made from is not among ``urls``, or no shard holds a sample.
    """
    if old is None:
        shards = limit_samples(index_shards(list(urls), index_dir, index_all), limit)
        check_samples(shards)
        return PlanUpdate(shards, (), len(shards))
    update = _Update(old, index_dir)
    states = _look_up(urls)
    to_index = [url for url, state in zip(urls, states, strict=True) if not update.take_unchanged(url, state)]
    update.remember_indices(to_index)
    for shard in index_shards(to_index, index_dir, index_all):
        update.add(shard)
    return update.finish(limit)


def _look_up(urls: Sequence[str]) -> list[FileStat]:
    def look(url: str) -> FileStat:
        try:
            return storage.stat(url)
        except FileNotFoundError:
            return FileStat(-1, "")

    with ThreadPoolExecutor(_PARALLEL_LOOKUPS) as pool:
        return list(pool.map(look, urls))


class _Update:
    """The old plan's shards as they are found again, and the shards that are new."""

    def __init__(self, old: Plan, index_dir: str) -> None:
        self.old = old.shards
        self.index_dir = index_dir
        self.indices = set(storage.list_files(index_dir))
        self.shards: dict[int, PlannedShard] = {}
        self.to_recheck: list[int] = []
        self.others: list[PlannedShard] = []
        self.old_indices: dict[int, ShardIndex] = {}
        self.positions: dict[str, int] = {}
        # Of a shard that was empty or unused and is appended later, the last entry with samples counts.
        for position, shard in enumerate(self.old):
            if shard.samples or redact(shard.url) not in self.positions:
                self.positions[redact(shard.url)] = position

    def take_unchanged(self, url: str, state: FileStat) -> bool:
        """Whether the shard is the old plan's, as far as one look tells."""
        position = self.positions.get(redact(url))
        if position is None or not state.stamp:
            return False
        shard = self.old[position]
        if (state.size, state.stamp) != (shard.size, shard.stamp):
            return False
        if shard.samples and index_name(url) not in self.indices:
            return False
        self.shards[position] = replace(shard, url=url)
        return True

    def remember_indices(self, urls: list[str]) -> None:
        """Load the saved indices of shards that will be indexed again, so that a difference can be named."""
        for url in urls:
            position = self.positions.get(redact(url))
            if position is None or index_name(url) not in self.indices or len(self.old_indices) == _MOST_DIFFERENCES:
                continue
            index = load_saved(url, self.index_dir)
            if index is not None and index.digest == self.old[position].digest:
                self.old_indices[position] = index

    def add(self, shard: PlannedShard) -> None:
        """A shard that was indexed: the old plan's at its URL where the content is the same, else put aside."""
        position = self.positions.get(redact(shard.url))
        if position is None:
            self.others.append(shard)
            return
        was = self.old[position]
        if was.samples and shard.digest == was.digest:
            self._keep(position, shard)
        elif was.samples == 0 and shard.samples == 0:
            self.shards[position] = replace(shard, used=0, spread=False)
        else:
            self.others.append(shard)

    def _keep(self, position: int, shard: PlannedShard) -> None:
        was = self.old[position]
        self.shards[position] = replace(shard, used=was.used, spread=was.spread)
        if (redact(shard.url), shard.size, shard.stamp) != (redact(was.url), was.size, was.stamp) or not shard.stamp:
            self.to_recheck.append(position)

    def finish(self, limit: int | None) -> PlanUpdate:
        """Find what moved by its digest, refuse what changed or is gone, append the rest."""
        lost = [position for position, shard in enumerate(self.old) if position not in self.shards and shard.samples]
        by_digest: dict[str, list[int]] = {}
        for position in reversed(lost):
            by_digest.setdefault(self.old[position].digest, []).append(position)
        new = []
        for shard in self.others:
            positions = by_digest.get(shard.digest)
            if positions:
                self._keep(positions.pop(), shard)
            else:
                new.append(shard)
        at_old_places = {redact(shard.url): shard for shard in self.others}
        for position in lost:
            was = self.old[position]
            if position in self.shards:
                continue
            if not was.used:
                self.shards[position] = was
                continue
            now = at_old_places.get(redact(was.url))
            if now is None or now.size < 0:
                raise _gone(was, now)
            raise self._changed(position, now)
        for position, was in enumerate(self.old):
            if position not in self.shards:
                # It was missing or empty. If it has samples now these are appended, and its fault is mended.
                now = at_old_places.get(redact(was.url))
                self.shards[position] = replace(was, faults=()) if now and now.samples else was
        kept = [self.shards[position] for position in range(len(self.old))]
        left = None if limit is None else max(0, limit - sum(shard.used for shard in kept))
        added = limit_samples(new, left)
        check_samples([*kept, *added])
        return PlanUpdate((*kept, *added), tuple(sorted(self.to_recheck)), len(added))

    def _changed(self, position: int, now: PlannedShard) -> InputChangedError:
        was = self.old[position]
        differences = [
            f"{name} {after}, {before} then"
            for name, before, after in (("bytes", was.size, now.size), ("samples", was.samples, now.samples))
            if before != after
        ]
        if position in self.old_indices:
            differences.append(_first_difference(self.old_indices[position], saved_index(now.url, self.index_dir)))
        if not differences:
            differences.append("names, sizes or header checksums of its members differ")
        return InputChangedError(
            f"{now.url} is not the shard that the store was made from: {'; '.join(differences)}. Put the old one back, "
            "or start a new store with another --out"
        )


def _gone(was: PlannedShard, now: PlannedShard | None) -> InputError:
    where = "is missing" if now is not None else "is not among the input shards any more"
    return InputError(
        f"{was.url}, of which the store holds {was.used} samples, {where}, and no other shard has its content; "
        "name it again or put it back (a store keeps the shards it was made from; new ones may be added)"
    )


def _first_difference(was: ShardIndex, now: ShardIndex) -> str:
    """Which member is the first that differs."""

    def members(index: ShardIndex) -> list[tuple[str, int, int]]:
        return [(f"{s.key}.{m.ext}", m.size, m.mark) for s in index.samples for m in s.members]

    for number, (before, after) in enumerate(zip_longest(members(was), members(now))):
        if before == after:
            continue
        if before is None or after is None:
            return f"member {number} is {after[0] if after else 'missing'}, {before[0] if before else 'missing'} then"
        if before[:2] != after[:2]:
            return f"member {number} is {after[0]} of {after[1]} bytes, {before[0]} of {before[1]} bytes then"
        return f"the header of member {number} ({after[0]}) has another time or mode"
    return "the tar's members are the same"

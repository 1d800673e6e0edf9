"""Indexes many shards at once, on the cluster."""

from collections.abc import Iterator

import ray.data

from pipeline.inputs.plan import PlannedShard, plan_shard

__all__ = ["index_on_ray", "number_rows"]

_PARALLEL_INDEXING = 32
_MOST_BLOCKS = 10_000


def number_rows(count: int) -> ray.data.Dataset:
    """Rows ``{"id": n}``, each in a block of its own as far as there are not too many.

    Not by ``ray.data.range``, whose tasks ask for a whole CPU each: where actors and loaders have taken up the machine,
    they would wait for it for ever.
    """
    return ray.data.from_items(
        [{"id": number} for number in range(count)], override_num_blocks=min(count, _MOST_BLOCKS)
    )


def index_on_ray(urls: list[str], index_dir: str) -> Iterator[PlannedShard]:
    """Index the shards, on the cluster where they are many: ``index_all`` of :func:`plan_input`."""
    if len(urls) < _PARALLEL_INDEXING:
        yield from (plan_shard(url, index_dir) for url in urls)
        return
    rows = ray.data.from_items(
        [{"number": number, "url": url} for number, url in enumerate(urls)],
        override_num_blocks=min(len(urls), _MOST_BLOCKS),
    ).map(lambda row: {"number": row["number"], "shard": [plan_shard(row["url"], index_dir)]}, num_cpus=0.5)
    found = {row["number"]: row["shard"][0] for row in rows.iter_rows()}
    yield from (found[number] for number in range(len(urls)))

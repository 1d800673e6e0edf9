"""Indexes many shards at once, on the cluster."""

from collections.abc import Callable, Iterator

import ray.data

from pipeline.cluster.faults import ray_errors_in_one_line
from pipeline.cluster.rows import MOST_BLOCKS, read_rows
from pipeline.inputs.plan import PlannedShard, index_shards, plan_shard

__all__ = ["index_on_ray"]

_PARALLEL_INDEXING = 32


def index_on_ray(urls: list[str], index_dir: str, start: Callable[[], None] = lambda: None) -> Iterator[PlannedShard]:
    """Index the shards, on the cluster where they are many: ``index_all`` of :func:`plan_input`.

    Args:
        urls: the shards.
        index_dir: where the indices are kept.
        start: connects to the cluster, or starts Ray; called only where the shards are many.
    """
    if len(urls) < _PARALLEL_INDEXING:
        yield from index_shards(urls, index_dir)
        return
    start()
    dataset = ray.data.from_items(
        [{"number": number, "url": url} for number, url in enumerate(urls)],
        override_num_blocks=min(len(urls), MOST_BLOCKS),
    ).map(lambda row: {"number": row["number"], "shard": [plan_shard(row["url"], index_dir)]}, num_cpus=0.5)
    with (
        ray_errors_in_one_line(lambda: "the input is not indexed yet; run the same command again"),
        read_rows(dataset) as rows,
    ):
        shards = {row["number"]: row["shard"][0] for row in rows}
    yield from (shards[number] for number in range(len(urls)))

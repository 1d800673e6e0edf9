"""Holds a unit's stored labels against its input, decoded again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.compute.load import decode_options, load_unit
from pipeline.decode.kinds import label_spec
from pipeline.errors import InputChangedError, InputError
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.inputs.tar import ShardIndex, index_tar
from pipeline.redaction import redact
from pipeline.store.layout import AnyArray
from pipeline.store.ledger import Receipt
from pipeline.store.provenance import stored_config

__all__ = ["check_source"]


@dataclass(frozen=True)
class _PresentInput(Plan):
    """A plan whose samples are read from an input shard as it is now, wherever it lies now."""

    present: ShardIndex

    def index(self, shard: int) -> ShardIndex:
        return self.present


@lru_cache(maxsize=8)
def _present_index(url: str) -> ShardIndex:
    return index_tar(url)


def check_source(
    out: str,
    plan: Plan,
    key: UnitKey,
    receipt: Receipt,
    arrays: Mapping[str, AnyArray],
    url: str | None = None,
) -> Iterator[str]:
    """What differs between a unit's labels as stored and as decoded again from the input shard.

    Args:
        out: the store.
        plan: its plan.
        key: the unit.
        receipt: of the unit.
        arrays: the store's arrays, by name.
        url: where the input shard lies now; by default where the plan says.

    Raises:
        InputChangedError: the shard is not the one that the store was made from.
        InputError: there is no such shard, or it cannot be read.
        OSError: it cannot be read, after retries.
    """
    planned = plan.shards[key.shard]
    present = _present_index(url or planned.url)
    if present.size < 0:
        raise InputError(f"{redact(present.url)} is gone")
    if present.digest != planned.digest:
        raise InputChangedError(
            f"{redact(present.url)} is not the shard that the store was made from: names, sizes or headers of its "
            f"members differ (digest {present.digest[:12]}, the plan has {planned.digest[:12]}); put the shard back"
        )
    config, setup = stored_config(out, partial=True)
    here = _PresentInput(plan.shards, plan.rows_per_shard, plan.index_dir, present)
    loaded = load_unit(here, key, decode_options(config, tuple(setup["mean"])))
    for offset, (record, again) in enumerate(zip(receipt.samples, loaded.records, strict=True)):
        row = key.row + offset
        if record.key != again.key:
            yield f"row {row} is {record.key} in the store and {again.key} in the input"
            continue
        if record.status != "ok":
            continue
        if again.status != "ok":
            yield f"row {row} ({record.key}) is in the store, and cannot be decoded again: {again.detail}"
            continue
        for kind in config.labels:
            stored = np.asarray(arrays[kind][row])
            floating = label_spec(kind, config.seg_dtype).dtype.startswith("float")
            if not np.array_equal(stored, loaded.blocks[kind][offset], equal_nan=floating):
                yield f"{kind} row {row} ({record.key}) differs from the input's label through the same transform"

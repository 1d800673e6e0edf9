"""Holds a unit against its input, read again: the bytes it was made from, and its labels."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from pipeline.compute.load import decode_options, load_unit
from pipeline.decode.kinds import label_spec
from pipeline.errors import InputChangedError, InputError
from pipeline.inputs import storage
from pipeline.inputs.manifest import is_manifest, load_manifest
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.inputs.storage import FileStat
from pipeline.inputs.tar import ShardIndex, index_tar
from pipeline.redaction import redact
from pipeline.store.layout import AnyArray
from pipeline.store.ledger import Receipt
from pipeline.store.provenance import stored_config

__all__ = ["check_source"]


# Seconds that decoding a sample may take here.
_PATIENCE = 600.0


@dataclass(frozen=True)
class _PresentInput(Plan):
    """A plan whose samples are read from an input shard as it is now, wherever it lies now."""

    present: ShardIndex

    def index(self, shard: int) -> ShardIndex:
        return self.shards[shard].choose(self.present)


@lru_cache(maxsize=8)
def _present_index(url: str, state: FileStat) -> ShardIndex:
    """The index of a shard in the version that ``state`` tells."""
    return load_manifest(url) if is_manifest(url) else index_tar(url)


def check_source(
    out: str,
    plan: Plan,
    key: UnitKey,
    receipt: Receipt,
    arrays: Mapping[str, AnyArray],
    url: str | None = None,
) -> Iterator[str]:
    """What differs between a unit's labels as stored and as decoded again from the input shard.

    Stored images are left out: the bytes they were made from are compared by their hash, and their pixels differ by
    rounding between versions of a JPEG decoder.

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
    place = url or planned.url
    try:
        present = _present_index(place, storage.stat(place))
    except FileNotFoundError as error:
        raise InputError(f"{redact(place)} is gone") from error
    if present.digest != planned.digest:
        raise InputChangedError(
            f"{redact(present.url)} is not the shard that the store was made from: names, sizes or headers of its "
            f"members differ (digest {present.digest[:12]}, the plan has {planned.digest[:12]}); put the shard back"
        )
    config, setup = stored_config(out, partial=True)
    shards = list(plan.shards)
    shards[key.shard] = replace(planned, url=present.url, size=present.size, stamp=present.stamp)
    here = _PresentInput(tuple(shards), plan.rows_per_shard, plan.index_dir, present)
    # What was stored under a higher limit than the first run's is right all the same.
    options = decode_options(config, tuple(setup["mean"]))
    loaded = load_unit(here, key, replace(options, max_bytes=sys.maxsize, decode_timeout=_PATIENCE))
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
        labels_differ = any(again.label_sha256.get(kind) != digest for kind, digest in record.label_sha256.items())
        if labels_differ or (record.sha256 and record.sha256 != again.sha256):
            raise InputChangedError(
                f"{redact(present.url)}: row {row} ({record.key}) was made from other bytes than the input holds now; "
                "put the old shard back"
            )
        for kind in config.labels:
            stored = np.asarray(arrays[kind][row])
            floating = label_spec(kind, config.seg_dtype).dtype.startswith("float")
            if not np.array_equal(stored, loaded.blocks[kind][offset], equal_nan=floating):
                yield f"{kind} row {row} ({record.key}) differs from the input's label through the same transform"

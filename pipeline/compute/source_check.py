"""Holds a unit's stored labels against its input, decoded again."""

from collections.abc import Iterator, Mapping

import numpy as np

from pipeline.compute.load import decode_options, load_unit
from pipeline.decode.kinds import label_spec
from pipeline.errors import PipelineError
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.store.layout import AnyArray
from pipeline.store.ledger import Receipt
from pipeline.store.provenance import stored_config

__all__ = ["check_source"]


def check_source(out: str, plan: Plan, key: UnitKey, receipt: Receipt, arrays: Mapping[str, AnyArray]) -> Iterator[str]:
    """What differs between a unit's labels as stored and as decoded again from the input shard.

    Args:
        out: the store.
        arrays: its arrays, by name.
    """
    config, setup = stored_config(out, partial=True)
    options = decode_options(config, tuple(setup["mean"]))
    try:
        loaded = load_unit(plan, key, options)
    except (PipelineError, OSError) as error:
        yield f"{key}: the input cannot be read again: {error}"
        return
    for offset, (record, again) in enumerate(zip(receipt.samples, loaded.records, strict=True)):
        row = key.row + offset
        if record.key != again.key:
            yield f"row {row} is {record.key} in the store and {again.key} in the input"
            continue
        if record.status != "ok":
            continue
        for kind in config.labels:
            stored = np.asarray(arrays[kind][row])
            floating = label_spec(kind, config.seg_dtype).dtype.startswith("float")
            if not np.array_equal(stored, loaded.blocks[kind][offset], equal_nan=floating):
                yield f"{kind} row {row} ({record.key}) differs from the input's label through the same transform"

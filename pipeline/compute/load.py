"""The loading stage: one unit of work becomes blocks of decoded images and aligned labels."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.decode.kinds import label_spec
from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import PreparedSample, prepare_sample
from pipeline.errors import PipelineError, Reason, SampleError
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import IndexedSample, ShardIndex
from pipeline.options import Size
from pipeline.redaction import redact
from pipeline.store.ledger import Receipt, SampleRecord

if TYPE_CHECKING:
    from pipeline.config.base import BackboneConfig
    from pipeline.config.precompute import PrecomputeConfig


__all__ = [
    "LoadedUnit",
    "decode_options",
    "empty_blocks",
    "failed_unit",
    "image_options",
    "image_size",
    "load_row",
    "load_sample",
    "load_unit",
    "unpack",
]


@dataclass(frozen=True, eq=False)
class LoadedUnit:
    """One unit, decoded.

    ``blocks``: ``image`` uint8 ``[R, H, W, 3]`` and every label ``[R, ...]``, with ``R`` rows per shard and fill values
    where there is no good sample; ``records``: one a sample; ``shard``: the digest of the input shard; ``seconds`` and
    ``sizes`` (bytes): of each stage.
    """

    blocks: dict[str, NDArray[Any]]
    records: tuple[SampleRecord, ...]
    shard: str
    seconds: dict[str, float]
    sizes: dict[str, int]


def image_size(config: "PrecomputeConfig") -> Size:
    """(height, width) images are decoded at: the backbone's, or the output's where that is larger, for the guidance."""
    target = config.target_size
    inside = target.height <= config.size.height and target.width <= config.size.width
    return config.size if inside else target


def image_options(config: "BackboneConfig", mean: tuple[float, float, float]) -> DecodeOptions:
    """The decoder's options for images alone; padding has the colour that the backbone's normalisation makes zero."""
    return DecodeOptions.of(config, labels=(), fill=_fill(mean))


def decode_options(config: "PrecomputeConfig", mean: tuple[float, float, float]) -> DecodeOptions:
    """The decoder's options, for the image and its labels."""
    return DecodeOptions.of(config, size=image_size(config), label_size=config.target_size, fill=_fill(mean))


def _fill(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def load_sample(index: ShardIndex, position: int, options: DecodeOptions) -> PreparedSample:
    """Read and decode one sample of a shard.

    Raises:
        SampleError: it cannot be used.
    """
    (members,) = read_samples(index, position, position + 1)
    if isinstance(members, SampleError):
        raise members
    return prepare_sample(members, options)


def load_unit(plan: Plan, key: UnitKey, options: DecodeOptions) -> LoadedUnit:
    """Read and decode one unit. Samples that cannot be used are recorded, and leave fill values.

    Raises:
        InputError: the shard is not the one that was planned.
        OSError: it cannot be read, after retries.
    """
    rows = plan.rows_per_shard
    index = plan.index(key.shard)
    wanted = set(options.image_exts)
    specs = [label_spec(kind, options.seg_dtype) for kind in options.labels]
    wanted.update(ext for spec in specs for ext in spec.extensions)
    started = time.perf_counter()
    samples = read_samples(index, key.start, key.stop, wanted.__contains__)
    read_done = time.perf_counter()

    blocks = empty_blocks(rows, options)
    records = []
    for offset, (entry, members) in enumerate(zip(index.samples[key.start : key.stop], samples, strict=True)):
        row = key.row + offset
        try:
            if isinstance(members, SampleError):
                raise members
            sample = prepare_sample(members, options)
        except SampleError as error:
            truncated = _cut_off(index, entry, key.start + offset, error)
            reason, detail = (Reason.TAR_TRUNCATED, truncated) if truncated else (error.reason, error.detail)
            records.append(SampleRecord(entry.key, row, "failed", reason.value, detail))
            continue
        blocks["image"][offset] = sample.image
        for kind, label in sample.labels.items():
            blocks[kind][offset] = label
        if "valid" in blocks:
            blocks["valid"][offset] = sample.valid
        records.append(
            SampleRecord(
                key=entry.key,
                row=row,
                status="ok",
                source_size=sample.transform.source_size,
                transform=sample.transform.to_row(),
                flags=sample.flags,
                orientation=sample.orientation,
                decoder=sample.decoder,
                sha256=sample.sha256,
                label_sha256=sample.label_sha256,
            )
        )
    decode_done = time.perf_counter()
    read_bytes = sum(len(data) for one in samples if not isinstance(one, SampleError) for data in one.values())
    return LoadedUnit(
        blocks=blocks,
        records=tuple(records),
        shard=plan.shards[key.shard].digest,
        seconds={"read": read_done - started, "decode": decode_done - read_done},
        sizes={"read": read_bytes, "decode": sum(block.nbytes for block in blocks.values())},
    )


def empty_blocks(rows: int, options: DecodeOptions) -> dict[str, NDArray[Any]]:
    """Blocks of ``rows`` rows that hold no sample."""
    target = options.label_size or options.size
    blocks: dict[str, NDArray[Any]] = {"image": np.zeros((rows, *options.size, 3), np.uint8)}
    for kind in options.labels:
        spec = label_spec(kind, options.seg_dtype)
        blocks[kind] = np.full((rows, *(target if spec.per_pixel else ())), spec.fill, spec.dtype)
    if options.geometry == "pad":
        blocks["valid"] = np.zeros((rows, *target), np.uint8)
    return blocks


def _cut_off(index: ShardIndex, entry: IndexedSample, position: int, error: SampleError) -> str:
    """Why a sample's members are missing, where it is the last one before the end of a truncated tar; else empty."""
    if position != len(index.samples) - 1 or error.reason not in (Reason.LABEL_MISSING, Reason.IMAGE_MISSING):
        return ""
    cuts = [fault for fault in index.faults if fault.startswith(("truncated", "no end-of-archive"))]
    return f"{error.detail}; {cuts[0]}" if cuts and entry.problem is None else ""


def load_row(row: dict[str, Any], fetch: Callable[[Any], Any], reference: Any) -> dict[str, Any]:
    """Row ``{"id": n}`` to the n-th unit that is to be done, loaded and packed as one row.

    A unit that cannot be loaded comes as the account of its failure, beside empty arrays: all rows have the same
    columns. This module imports neither torch nor zarr, so that the processes that load start fast and stay small.

    Args:
        fetch: gets what ``reference`` stands for: the plan, the numbers of the units to do, and the decoder's options.
    """
    plan, todo, options = _fetched(fetch, reference)
    key: UnitKey = plan.unit(int(todo[row["id"]]))
    try:
        return pack(key, load_unit(plan, key, options))
    except (PipelineError, OSError) as error:
        records = tuple(
            SampleRecord(entry.key, key.row + offset, "ok") for offset, entry in enumerate(plan.unit_samples(key))
        )
        receipt = failed_unit(key, plan.shards[key.shard].digest, records, error)
        return {"meta": receipt.to_json(), "failed": True, **empty_blocks(plan.rows_per_shard, options)}


@lru_cache(maxsize=2)
def _fetched(fetch: Callable[[Any], Any], reference: Any) -> Any:
    """Fetched once in each process."""
    return fetch(reference)


def failed_unit(key: UnitKey, shard: str, records: tuple[SampleRecord, ...], error: Exception) -> Receipt:
    """The account of a unit that failed for good; its samples failed with it."""
    text = redact(f"{type(error).__name__}: {error}")
    lost = tuple(
        replace(record, status="failed", reason=Reason.UNIT_FAILED.value, detail=text)
        if record.status == "ok"
        else record
        for record in records
    )
    return Receipt(
        unit=key, shard=shard, samples=lost, worker={"host": platform.node(), "pid": os.getpid()}, error=text
    )


def pack(key: UnitKey, loaded: LoadedUnit) -> dict[str, Any]:
    """One unit as one row: its arrays, and the rest as JSON."""
    meta = {
        "unit": asdict(key),
        "records": [asdict(record) for record in loaded.records],
        "shard": loaded.shard,
        "seconds": loaded.seconds,
        "sizes": loaded.sizes,
    }
    return {"meta": json.dumps(meta).encode(), "failed": False, **loaded.blocks}


def unpack(batch: Mapping[str, NDArray[Any]]) -> Iterator[tuple[UnitKey, LoadedUnit | Receipt]]:
    """The units of a batch of rows."""
    for position, text in enumerate(batch["meta"]):
        if batch["failed"][position]:
            receipt = Receipt.from_json(text)
            yield receipt.unit, receipt
            continue
        meta = json.loads(text)
        records = Receipt.from_json(
            json.dumps({"unit": meta["unit"], "shard": "", "samples": meta["records"]}).encode()
        ).samples
        # Ray hands out read-only views of its object store; labels of failed samples are overwritten later.
        blocks = {
            name: column[position] if name == "image" else np.array(column[position])
            for name, column in batch.items()
            if name not in ("meta", "failed")
        }
        yield UnitKey(**meta["unit"]), LoadedUnit(blocks, records, meta["shard"], meta["seconds"], meta["sizes"])

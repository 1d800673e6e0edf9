"""The loading stage: one unit of work becomes blocks of decoded images and aligned labels."""

import atexit
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.outcome import Outcome, failed_unit
from pipeline.decode.kinds import label_spec
from pipeline.decode.members import check_bytes, hash_members, select_members
from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import PreparedSample, prepare_sample
from pipeline.decode.worker import DecoderProcess
from pipeline.errors import Fault, PipelineError, Reason, SampleError, fault_of
from pipeline.inputs import storage
from pipeline.inputs.changes import check_unchanged
from pipeline.inputs.places import place_of
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.inputs.read import Sample, iter_samples
from pipeline.inputs.storage import RangeReader
from pipeline.inputs.tar import IndexedSample, ShardIndex, describe_members
from pipeline.inputs.video import FrameLimits
from pipeline.options import Size
from pipeline.store.ledger import Ledger, Receipt, SampleRecord

if TYPE_CHECKING:
    from pipeline.config.base import BackboneConfig
    from pipeline.config.precompute import PrecomputeConfig


__all__ = [
    "LoadedUnit",
    "decode_options",
    "empty_blocks",
    "image_options",
    "image_size",
    "iter_members",
    "load_row",
    "load_sample",
    "load_unit",
    "read_members",
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
    """Read and decode one sample of a shard, in this process.

    The limits on bytes, pixels and scans hold; ``options.decode_timeout`` does not, as it takes a child process for
    every thread that calls this. Callers fit on a selection of samples, or hold them in memory anyway.

    Raises:
        SampleError: it cannot be used.
    """
    (members,) = read_members(index, position, position + 1, options)
    if isinstance(members, SampleError):
        raise members
    return prepare_sample(members, options)


def load_unit(
    plan: Plan,
    key: UnitKey,
    options: DecodeOptions,
    decode: Callable[[Sample, DecodeOptions], PreparedSample] | None = None,
    *,
    read: RangeReader = storage.read_range,
) -> LoadedUnit:
    """Read and decode one unit. Samples that cannot be used are recorded, and leave fill values.

    The shard is looked up before and after its samples are read, so that a unit never mixes two versions of it.

    Args:
        plan: the plan.
        key: the unit.
        options: of decoding.
        decode: prepares the members of a sample; by default a child process of this one, within
            ``options.decode_timeout``.
        read: reads byte ranges.

    Raises:
        InputChangedError: the shard is not the one that was planned.
        EnvironmentFault: it may not be read, or no child process can be started.
        OSError: it cannot be read, after retries.
    """
    decode = decode or _decoder(os.getpid()).prepare
    index = plan.index(key.shard)
    started = time.perf_counter()
    check_unchanged(plan.shards[key.shard])
    samples = iter_members(index, key.start, key.stop, options, read)
    blocks = empty_blocks(plan.rows_per_shard, options)
    records = []
    read_seconds, read_bytes = 0.0, 0
    for offset, entry in enumerate(index.samples[key.start : key.stop]):
        asked = time.perf_counter()
        members = next(samples)
        read_seconds += time.perf_counter() - asked
        if not isinstance(members, SampleError):
            read_bytes += sum(map(len, members.values()))
        record = SampleRecord(entry.key, key.row + offset, "ok")
        try:
            if isinstance(members, SampleError):
                raise members
            sha256, label_sha256 = hash_members(members, options)
            record = replace(record, sha256=sha256, label_sha256=label_sha256)
            sample = decode(members, options)
        except SampleError as error:
            reason, detail = error.reason, error.detail
            if members is not error and reason in (Reason.IMAGE_MISSING, Reason.LABEL_MISSING):
                detail = f"{detail}, which has {describe_members(entry)}"
                if truncated := _cut_off(index, entry, key.start + offset):
                    reason, detail = Reason.TAR_TRUNCATED, f"{detail}; {truncated}"
            records.append(replace(record, status="failed", reason=reason.value, detail=detail))
            continue
        blocks["image"][offset] = sample.image
        for kind, label in sample.labels.items():
            blocks[kind][offset] = label
        if "valid" in blocks:
            blocks["valid"][offset] = sample.valid
        records.append(
            replace(
                record,
                source_size=sample.transform.source_size,
                transform=sample.transform.to_row(),
                flags=sample.flags,
                orientation=sample.orientation,
                decoder=sample.decoder,
            )
        )
    check_unchanged(plan.shards[key.shard])
    seconds = time.perf_counter() - started
    return LoadedUnit(
        blocks=blocks,
        records=tuple(records),
        shard=plan.shards[key.shard].digest,
        seconds={"read": read_seconds, "decode": seconds - read_seconds},
        sizes={"read": read_bytes, "decode": sum(block.nbytes for block in blocks.values())},
    )


@lru_cache(maxsize=1)
def _decoder(process: int) -> DecoderProcess:
    """The decoder of this process; its number is the argument because a forked process needs its own."""
    decoder = DecoderProcess()
    atexit.register(decoder.close)
    return decoder


def read_members(
    index: ShardIndex, start: int, stop: int, options: DecodeOptions, read: RangeReader = storage.read_range
) -> list[Sample | SampleError]:
    """The image and labels of samples ``start`` to ``stop`` as bytes, or why a sample has none that can be used.

    Members that are not decoded, and samples with files of more than ``options.max_bytes``, are not read; frames and
    cells of tables are measured when they are decoded. That the image and all labels are there is not checked.

    Raises:
        InputChangedError: the shard is not the one that was indexed.
        OSError: it cannot be read, after retries.
    """
    return list(iter_members(index, start, stop, options, read))


def iter_members(
    index: ShardIndex, start: int, stop: int, options: DecodeOptions, read: RangeReader = storage.read_range
) -> Iterator[Sample | SampleError]:
    """What :func:`read_members` returns, one after the other: of the frames of a video one is held at a time."""
    entries = tuple(_limited(entry, options) for entry in index.samples[start:stop])
    limits = FrameLimits(options.max_pixels, options.decode_timeout)
    return iter_samples(replace(index, samples=entries), 0, len(entries), read=read, limits=limits)


def _limited(entry: IndexedSample, options: DecodeOptions) -> IndexedSample:
    """A sample with only the members that are decoded, or with the problem that one of them is too large."""
    selected = select_members({member.ext for member in entry.members}, options).values()
    members = tuple(member for member in entry.members if member.ext in selected)
    try:
        # Of frames and cells only an estimate is known: they are measured when they were read.
        known = (member for member in members if place_of(member) is None)
        check_bytes(((member.ext, member.size) for member in known), options.max_bytes)
    except SampleError as error:
        return replace(entry, problem=entry.problem or (error.reason, error.detail))
    return replace(entry, members=members)


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


def _cut_off(index: ShardIndex, entry: IndexedSample, position: int) -> str:
    """The fault that cut a sample's members off, where it is the last one of a truncated tar; else empty."""
    if position != len(index.samples) - 1 or entry.problem is not None:
        return ""
    return next((fault for fault in index.faults if fault.startswith(("truncated", "no end-of-archive"))), "")


def load_row(row: dict[str, Any], fetch: Callable[[Any], Any], reference: Any) -> dict[str, Any]:
    """Row ``{"id": n}`` to the n-th unit that is to be done, loaded and packed as one row.

    A unit that has a receipt is not read: its receipt is passed on. A unit that cannot be loaded becomes a receipt with
    its error. Either comes with empty blocks, because all rows have the same columns.

    This module imports neither torch nor Ray, so that the processes that load start fast and stay small.

    Args:
        row: the position of the unit among those that are to be done.
        fetch: gets the object that ``reference`` stands for.
        reference: the plan, the numbers of the units to do, the options of decoding, and the store's URL.
    """
    plan, todo, options, out = _fetched(fetch, reference)
    key: UnitKey = plan.unit(int(todo[row["id"]]))
    shard = plan.shards[key.shard].digest
    try:
        receipt = Ledger(storage.join(out, "ledger")).get(key, shard)
        if receipt is None:
            return pack(key, load_unit(plan, key, options))
        outcome = Outcome(receipt)
    except (PipelineError, OSError) as error:
        records = tuple(
            SampleRecord(name, key.row + offset, "ok") for offset, name in enumerate(_sample_keys(plan, key))
        )
        outcome = Outcome(failed_unit(key, shard, records, error), fault_of(error))
    return {
        "meta": outcome.receipt.to_json(),
        "settled": True,
        "fault": outcome.fault,
        **empty_blocks(plan.rows_per_shard, options),
    }


@lru_cache(maxsize=2)
def _fetched(fetch: Callable[[Any], Any], reference: Any) -> Any:
    """Fetched once in each process."""
    return fetch(reference)


def _sample_keys(plan: Plan, key: UnitKey) -> list[str]:
    """The keys of a unit's samples; empty where it is the index that cannot be read."""
    try:
        return [entry.key for entry in plan.unit_samples(key)]
    except (PipelineError, OSError):
        return [""] * len(key)


def pack(key: UnitKey, loaded: LoadedUnit) -> dict[str, Any]:
    """One unit as one row: its arrays, and the rest as JSON."""
    meta = {
        "unit": asdict(key),
        "records": [asdict(record) for record in loaded.records],
        "shard": loaded.shard,
        "seconds": loaded.seconds,
        "sizes": loaded.sizes,
    }
    return {"meta": json.dumps(meta).encode(), "settled": False, "fault": "", **loaded.blocks}


def unpack(batch: Mapping[str, NDArray[Any]]) -> Iterator[tuple[UnitKey, LoadedUnit | Outcome]]:
    """The units of a batch of rows: loaded ones, and the outcome of those that are done already or failed."""
    for position, text in enumerate(batch["meta"]):
        if batch["settled"][position]:
            receipt = Receipt.from_json(text)
            fault: Fault = str(batch["fault"][position])  # type: ignore[assignment]
            yield receipt.unit, Outcome(receipt, fault)
            continue
        meta = json.loads(text)
        records = Receipt.from_json(
            json.dumps({"unit": meta["unit"], "shard": "", "samples": meta["records"]}).encode()
        ).samples
        # Ray hands out read-only views of its object store; labels of failed samples are overwritten later.
        blocks = {
            name: column[position] if name == "image" else np.array(column[position])
            for name, column in batch.items()
            if name not in ("meta", "settled", "fault")
        }
        yield UnitKey(**meta["unit"]), LoadedUnit(blocks, records, meta["shard"], meta["seconds"], meta["sizes"])

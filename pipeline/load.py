"""The loading stage: one unit of work becomes blocks of decoded images and aligned labels."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrecomputeConfig, Size
from pipeline.decode import DecodeOptions, PreparedSample, label_spec, prepare_sample
from pipeline.errors import Reason, SampleError
from pipeline.ledger import SampleRecord
from pipeline.plan import Plan, UnitKey
from pipeline.read import read_samples
from pipeline.tarindex import IndexedSample, ShardIndex

__all__ = ["LoadedUnit", "decode_options", "image_size", "load_sample", "load_unit"]


@dataclass(frozen=True, eq=False)
class LoadedUnit:
    """One unit, decoded.

    ``blocks``: ``image`` uint8 ``[R, H, W, 3]`` and every label ``[R, ...]``, with ``R`` rows per shard and fill values
    where there is no good sample; ``records``: one a sample; ``seconds`` and ``sizes`` (bytes): of each stage.
    """

    blocks: dict[str, NDArray[Any]]
    records: tuple[SampleRecord, ...]
    seconds: dict[str, float]
    sizes: dict[str, int]


def image_size(config: PrecomputeConfig) -> Size:
    """(height, width) images are decoded at: the backbone's, or the output's where that is larger, for the guidance."""
    target = config.target_size
    inside = target.height <= config.size.height and target.width <= config.size.width
    return config.size if inside else target


def decode_options(config: PrecomputeConfig, mean: tuple[float, float, float]) -> DecodeOptions:
    """The decoder's options; padding has the colour that the backbone's normalisation makes zero."""
    red, green, blue = (round(255 * value) for value in mean)
    return DecodeOptions(
        size=image_size(config),
        label_size=config.target_size,
        geometry=config.geometry,
        labels=config.labels,
        image_exts=config.image_exts,
        max_pixels=config.max_pixels,
        fill=(red, green, blue),
        seg_dtype=config.seg_dtype,
        depth_png_scale=config.depth_png_scale,
        depth_npy_scale=config.depth_npy_scale,
        label_orientation=config.label_orientation,
    )


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

    target = options.label_size or options.size
    blocks: dict[str, NDArray[Any]] = {"image": np.zeros((rows, *options.size, 3), np.uint8)}
    for spec in specs:
        blocks[spec.kind] = np.full((rows, *(target if spec.per_pixel else ())), spec.fill, spec.dtype)
    if options.geometry == "pad":
        blocks["valid"] = np.zeros((rows, *target), np.uint8)
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
            )
        )
    decode_done = time.perf_counter()
    read_bytes = sum(len(data) for one in samples if not isinstance(one, SampleError) for data in one.values())
    return LoadedUnit(
        blocks=blocks,
        records=tuple(records),
        seconds={"read": read_done - started, "decode": decode_done - read_done},
        sizes={"read": read_bytes, "decode": sum(block.nbytes for block in blocks.values())},
    )


def _cut_off(index: ShardIndex, entry: IndexedSample, position: int, error: SampleError) -> str:
    """Why a sample's members are missing, where it is the last one before the end of a truncated tar; else empty."""
    if position != len(index.samples) - 1 or error.reason not in (Reason.LABEL_MISSING, Reason.IMAGE_MISSING):
        return ""
    cuts = [fault for fault in index.faults if fault.startswith(("truncated", "no end-of-archive"))]
    return f"{error.detail}; {cuts[0]}" if cuts and entry.problem is None else ""

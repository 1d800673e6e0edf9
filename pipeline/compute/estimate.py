"""The plan in words, before anything runs: sizes from arithmetic, times and memory from a timed handful of samples."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from featup.projection import PCA
from pipeline.compute.allotment import UNITS_IN_MEMORY, Work, actor_bytes, allotment_of, peak_bytes, this_machine
from pipeline.compute.device import set_threads
from pipeline.compute.load import decode_options, load_sample
from pipeline.compute.models import Extractor, fit_pca, take_pca
from pipeline.compute.prepare import as_stored, check_members, complete_plan, layout_of, plan_input
from pipeline.config.precompute import PrecomputeConfig
from pipeline.console import human_bytes, human_seconds
from pipeline.errors import InputError, Reason, SampleError
from pipeline.inputs.manifest import is_manifest
from pipeline.inputs.places import Place, place_of
from pipeline.inputs.plan import IndexAll, Plan, UnitKey
from pipeline.inputs.table_rows import large_groups
from pipeline.inputs.tar import describe_ignored
from pipeline.store.create import create_store
from pipeline.store.layout import OK
from pipeline.store.writer import StoreWriter

__all__ = ["estimate"]


_HANDFUL = 8


def estimate(config: PrecomputeConfig, index_all: IndexAll | None = None) -> str:
    """What a run would do and what it takes. Indexes the input (the indices are kept) and creates no store.

    Args:
        config: every option.
        index_all: indexes many shards at once; by default this process does.

    Raises:
        InputError: no sample can be found, or none of those tried can be decoded.
        FeatupError: a model, layer, size or checkpoint that does not fit.
    """
    # Lists of images go to a folder of their own: a store that is there keeps those it was made from.
    with tempfile.TemporaryDirectory(prefix="featup-") as folder:
        return _estimate(config, index_all, folder)


def _estimate(config: PrecomputeConfig, index_all: IndexAll | None, folder: str) -> str:
    notes: list[str] = []
    config = as_stored(config.absolute(on_cluster=False), notes.append)
    # A list is its own index, and only this machine sees it.
    shards = plan_input(config, None if config.images else index_all, folder)
    check_members(config, shards)
    extractor = Extractor(config)
    peak = peak_bytes()
    taken = take_pca(config.pca_from, config, extractor.setup())[0] if config.pca_from else None
    channels = len(taken.components) if taken else config.pca or extractor.backbone.channels
    plan = complete_plan(config, shards, channels)
    rows = plan.rows_per_shard
    layout = layout_of(config, rows, channels, plan.units)
    need = actor_bytes(config, layout, peak)
    models = need - UNITS_IN_MEMORY * rows * layout.sample_bytes
    work = Work(plan.units, need, fits=config.per_image)
    allotment = allotment_of(config, [this_machine()], work)
    threads = set_threads(config.threads, allotment.actors_per_node)

    seconds, ratio, tried = _time_handful(config, extractor, plan, threads, taken)
    total = plan.samples * layout.sample_bytes
    loading, computing, writing = seconds["read + decode"], seconds["features"] + seconds["upsample"], seconds["write"]
    # On a CPU all stages share the cores; on a GPU the slowest one sets the pace.
    cpu = extractor.device.type == "cpu"
    each = loading / threads + computing + writing if cpu else max(loading, computing, writing)
    unit = rows * layout.sample_bytes
    actors = allotment.actors
    features = layout.arrays[0]
    chunk = 2 * int(np.prod(features.chunk))
    lines = [
        *(f"store:    {note}" for note in notes),
        f"input:    {len(shards)} shards, {plan.samples} samples",
        *(f"          fault: {fault}" for fault in plan.faults),
        *([f"          ignored by rule: {describe_ignored(plan.ignored)}"] if plan.ignored else []),
        *(f"          {remark}" for remark in large_groups(_places(plan))),
        f"models:   {config.backbone}, map {extractor.backbone.layer} of stride {extractor.backbone.stride[0]}, "
        f"{extractor.backbone.channels} channels, {extractor.grid[0]}x{extractor.grid[1]}; "
        f"{config.upsampler} to {config.target_size}, {channels} channels stored",
        f"units:    {plan.units} of up to {rows} samples; arrays of {plan.rows} rows, "
        f"{plan.rows - plan.samples} of them holes that cost nothing",
        f"chunk:    {features.chunk[0]}x{features.chunk[1]}x{channels} float16 = {human_bytes(chunk)}; "
        f"shard: {rows} images = {human_bytes(rows * features.row_bytes)}",
        *(
            f"bytes:    {spec.name:9s}{human_bytes(plan.samples * spec.row_bytes):>10s} before compression"
            for spec in layout.arrays
        ),
        f"bytes:    all      {human_bytes(total):>10s} before compression ({total} bytes), "
        f"about {human_bytes(total / ratio)} stored ({ratio:.2f}x, seen on {tried} samples)",
        f"memory:   about {human_bytes(need)} an actor: {human_bytes(models)} for models and one batch, and "
        f"two units of {human_bytes(unit)} under way, each with its encoding",
        "time:     " + ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items()) + " a sample "
        f"({tried} samples, {threads} threads, {extractor.setup().device})",
        f"time:     about {human_seconds(plan.samples * each / actors)}, {actors / each:.1f} samples/s; "
        f"{allotment.hint or f'actors: {actors}'}",
    ]
    return "\n".join(lines)


def _places(plan: Plan) -> Iterator[Place]:
    """The cells of tables that the plan reads."""
    for number, shard in enumerate(plan.shards):
        if is_manifest(shard.url):
            for sample in plan.index(number).samples:
                yield from filter(None, (place_of(member, "row") for member in sample.members))


def _time_handful(
    config: PrecomputeConfig, extractor: Extractor, plan: Plan, threads: int, pca: PCA | None
) -> tuple[dict[str, float], float, int]:
    """Seconds a sample of each stage, compression ratio of the features, and how many samples were tried."""
    options = decode_options(config, extractor.backbone.mean)
    images = []
    problems: list[str] = []
    count = min(_HANDFUL, plan.samples)
    started = time.perf_counter()
    for number in range(count):
        shard, position = plan.sample(number * plan.samples // count)
        try:
            images.append(load_sample(plan.index(shard), position, options).image)
        except SampleError as error:
            # Labels are no part of what is timed here; an image alone will do.
            if error.reason not in (Reason.LABEL_MISSING, Reason.LABEL_SIZE):
                problems.append(str(error))
    if not images:
        raise InputError(f"none of {count} samples can be decoded: {'; '.join(problems[:3])}; look at the shards")
    seconds = {"read + decode": (time.perf_counter() - started) / count}
    if config.pca is not None:
        few = min(config.pca_images, _HANDFUL)
        pca = fit_pca(extractor, plan, config.pca, max(few, -(-2 * config.pca // max(1, int(np.prod(extractor.grid))))))
    if pca is not None:
        extractor.project(pca)
    channels = extractor.channels
    batch = torch.from_numpy(np.stack(images[: config.batch_size]))
    size = config.target_size
    block = np.empty((len(batch), *size, channels), np.float16)
    extractor.upsample(extractor.features(batch[:1]), batch[:1], torch.from_numpy(block[:1]))  # warms kernels up
    started = time.perf_counter()
    features = extractor.features(batch)
    seconds["features"] = (time.perf_counter() - started) / len(batch)
    started = time.perf_counter()
    extractor.upsample(features, batch, torch.from_numpy(block))
    seconds["upsample"] = (time.perf_counter() - started) / len(batch)
    with tempfile.TemporaryDirectory(prefix="featup-") as folder:
        layout = replace(layout_of(config, len(batch), channels, 1), labels=(), valid_mask=False, image=False)
        create_store(folder, layout, {"identity": {}})
        writer = StoreWriter(folder, layout, threads)
        started = time.perf_counter()
        status = np.full(len(batch), OK, np.uint8)
        stored = writer.write(UnitKey(0, 0, 0, len(batch), 0), {"features": block, "status": status})
        seconds["write"] = (time.perf_counter() - started) / len(batch)
    return seconds, block.nbytes / max(1, stored), len(batch)

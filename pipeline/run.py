"""Chains the stages of a run; the one place that knows Ray Data.

``ray.data.range`` over the units that are left -> load (tasks: read and decode) -> featurize (actors: extract,
upsample, encode, write) -> receipts on the driver. A unit is one row from end to end.
"""

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
import ray.data
import yaml
from numpy.typing import NDArray

from featup.checkpoints import pca_bytes
from featup.errors import FeatupError
from pipeline import storage
from pipeline.config import InputConfig, PrecomputeConfig, describe
from pipeline.errors import JobFailedError, PipelineError, StoreError, StoreMismatchError
from pipeline.featurize import Extractor, Featurizer, Setup, fit_pca, pca_place, set_threads, take_pca
from pipeline.index import Summary, write_index
from pipeline.ledger import Ledger, Receipt
from pipeline.load import decode_options, load_row
from pipeline.plan import Plan, PlannedShard, make_plan, plan_shard, rows_of
from pipeline.progress import Progress
from pipeline.store import Layout, create_store, finished_attributes, list_differences, read_attributes, tile_of
from pipeline.verify import Finding, Verification, verify_index, verify_unit

__all__ = [
    "complete_plan",
    "connect",
    "create_all",
    "default_gpus",
    "index_on_ray",
    "layout_of",
    "plan_input",
    "precompute",
    "prepare",
    "stages",
    "verify",
    "versions",
]

_PARALLEL_INDEXING = 32
_MOST_BLOCKS = 10_000


def connect(object_store_mb: int, logs: ray.LoggingConfig | None = None) -> None:
    """Join the cluster that ``RAY_ADDRESS`` or ``ray job submit`` names, or start Ray on this machine.

    Args:
        object_store_mb: memory of Ray's object store where it is started here.
        logs: what the loggers of all processes are set to; by default as Ray does.
    """
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=logging.WARNING, logging_config=logs)
        else:
            ray.init(
                address="local",
                object_store_memory=object_store_mb << 20,
                include_dashboard=False,
                logging_level=logging.WARNING,
                logging_config=logs,
            )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block that fails is a fault of the program: units that fail come back as receipts that say so.
    context.max_errored_blocks = 0
    # Ray would walk the page tables of every worker each second to report its memory.
    context.memory_usage_poll_interval_s = None
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def precompute(config: PrecomputeConfig) -> Summary:
    """The main job: everything from shards to a store with its index. Running it again does only what is left.

    Returns:
        What became of every sample.

    Raises:
        JobFailedError: units failed for good, or too many samples did; all others are in the store.
        StoreMismatchError: ``out`` holds a store made with other options, input or weights.
    """
    config = config.absolute(on_cluster=bool(os.environ.get("RAY_ADDRESS")))
    _check_options(config)
    connect(config.object_store_mb)
    shards = plan_input(config, index_all=index_on_ray)
    gpus = default_gpus(config.gpus_per_actor)
    try:
        setup: Setup = ray.get(_prepare_remotely.options(num_cpus=1, num_gpus=gpus).remote(config, shards))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (PipelineError, FeatupError)):
            raise error.cause from None  # an error in the options, not one in a worker: its own text says it all
        raise
    plan = complete_plan(config, shards, setup.channels)
    layout = layout_of(config, plan.rows_per_shard, setup.channels, plan.units)
    ledger = Ledger(storage.join(config.out, "ledger"))
    done = ledger.done()
    if done and read_attributes(config.out) is None:
        raise StoreError(
            f"{config.out} has receipts and no arrays: features.zarr was removed or moved, and the receipts would make "
            "this run leave it empty; put it back, or remove the ledger folder as well"
        )
    create_all(config, plan, layout, setup)
    for fault in plan.faults:
        print(f"input fault: {fault}", flush=True)

    todo = np.array([unit for unit in range(plan.units) if unit not in done], dtype=np.int64)
    left = sum(len(plan.unit(int(unit))) for unit in todo)
    print(
        f"{config.out}: {plan.samples} samples in {plan.units} units, {len(done)} units done before, "
        f"{len(todo)} to do with {left} samples; backbone {config.backbone} on {setup.device}, "
        f"{setup.grid[0]}x{setup.grid[1]} to {config.target_size} by {config.upsampler}, {setup.channels} channels",
        flush=True,
    )
    failures: dict[int, Receipt] = {}
    if len(todo):
        progress = Progress(len(todo), left)
        for row in stages(config, plan, layout, setup, todo, gpus).iter_rows():
            receipt = Receipt.from_json(row["receipt"])
            progress.add(receipt)
            if receipt.error:
                failures[receipt.unit.unit] = receipt
                print(f"{receipt.unit} failed: {receipt.error}", file=sys.stderr, flush=True)
    summary = write_index(config.out, plan, ledger, failures)
    print(summary.text(), flush=True)
    _judge(config, summary)
    return summary


def _judge(config: PrecomputeConfig, summary: Summary) -> None:
    if summary.failed_units:
        raise JobFailedError(
            f"{len(summary.failed_units)} of {summary.units} units failed for good: "
            f"{summary.failed_units[:10]}; the reasons stand above and in index.parquet. Run the same command again "
            "to try only these"
        )
    fraction = summary.failed / max(1, summary.samples)
    if fraction > config.max_failed_fraction:
        raise JobFailedError(
            f"{summary.failed} of {summary.samples} samples failed ({fraction:.2%}), more than "
            f"max_failed_fraction={config.max_failed_fraction:.2%}; the rest is in the store. Look at the reasons, "
            "mend the shards and start a new store, or raise the limit"
        )


def plan_input(config: InputConfig, index_all: Any = None) -> tuple[PlannedShard, ...]:
    """Index the input shards; the indices are kept in ``OUT/plan/index``."""
    index_dir = storage.join(config.out, "plan", "index")
    storage.make_dirs(index_dir)
    return make_plan(config.shards, index_dir, config.limit, index_all)


def prepare(config: PrecomputeConfig, shards: tuple[PlannedShard, ...]) -> Setup:
    """Build the models once, learn their geometry and digests, and fit the PCA (or take this store's or another's).

    Raises:
        ConfigError: the PCA of ``pca_from`` is of other features.
        StoreError: there is no store at ``pca_from``, or it has no PCA.
    """
    set_threads(config.threads, config.actors)
    extractor = Extractor(config)
    setup = extractor.setup()
    found = finished_attributes(config.out)
    if config.pca_from is not None:
        pca, data = take_pca(config.pca_from, config, setup)
    elif config.pca is None:
        return setup
    elif found is not None:
        digests = setup.digests | {"pca": found["identity"]["pca digest"]}
        return replace(setup, channels=config.pca, digests=digests)
    else:
        plan = Plan(shards, 1, storage.join(config.out, "plan", "index"))
        pca = fit_pca(extractor, plan, config.pca, config.pca_images)
        data = pca_bytes(pca, backbone=config.backbone, layer=setup.layer, weights=setup.digests["backbone"])
    if found is None:
        # Of a store that is there the PCA stays: whether this is the same, its digest says before anything runs.
        storage.write_atomic(pca_place(config.out), data)
    return setup.with_pca(pca, data)


@ray.remote(max_retries=2)  # type: ignore[untyped-decorator]
def _prepare_remotely(config: PrecomputeConfig, shards: tuple[PlannedShard, ...]) -> Setup:
    return prepare(config, shards)


def layout_of(config: PrecomputeConfig, rows_per_shard: int, channels: int, units: int) -> Layout:
    """The store's layout."""
    size = config.target_size
    return Layout(
        rows=units * rows_per_shard,
        rows_per_shard=rows_per_shard,
        height=size.height,
        width=size.width,
        channels=channels,
        tile=tile_of(size, channels, config.tile),
        labels=config.labels,
        seg_dtype=config.seg_dtype,
        valid_mask=config.geometry == "pad",
        compression_level=config.compression_level,
    )


def complete_plan(config: PrecomputeConfig, shards: tuple[PlannedShard, ...], channels: int) -> Plan:
    """The plan, once the number of stored channels tells how many images make a Zarr shard."""
    rows = rows_of(layout_of(config, 1, channels, 1).sample_bytes, config.rows_per_shard)
    return Plan(shards, rows, storage.join(config.out, "plan", "index"))


def _check_options(config: PrecomputeConfig) -> None:
    """Refuse another run's store before anything in it is touched."""
    found = finished_attributes(config.out)
    if found is None:
        return
    wanted = config.identity()
    differences = list_differences({name: found["identity"].get(name) for name in wanted}, wanted)
    if differences:
        raise StoreMismatchError(
            f"{config.out} was made with other options:\n  " + "\n  ".join(differences) + "\n"
            "Finish it with the options it was made with, or give another --out."
        )


def create_all(config: PrecomputeConfig, plan: Plan, layout: Layout, setup: Setup) -> None:
    """Create the store, or check that the one there is this run's; keep plan and config beside it.

    Raises:
        StoreMismatchError: it was made with other options, input or weights; the text lists the differences.
    """
    place = storage.join(config.out, "plan", "plan.json")
    identity = config.identity() | {f"{name} digest": value for name, value in setup.digests.items()}
    identity |= {"input shards": len(plan.shards), "input samples": plan.samples, "input digest": plan.digest}
    provenance = {
        "identity": identity,
        "config": describe(config),
        "setup": asdict(setup),
        "versions": versions(),
    }
    try:
        create_store(config.out, layout, provenance)
    except StoreMismatchError as error:
        if storage.exists(place):
            old = Plan.from_json(storage.read_bytes(place), plan.index_dir)
            changed = [
                f"{now.url}: {was.size} bytes, {was.used} samples then; {now.size} bytes, {now.used} samples now"
                for was, now in zip(old.shards, plan.shards, strict=False)
                if (was.url, was.size, was.used) != (now.url, now.size, now.used)
            ]
            if changed:
                raise StoreMismatchError(f"{error}\nInput that changed:\n  " + "\n  ".join(changed[:10])) from error
        raise
    storage.write_atomic(place, plan.to_json())
    storage.write_atomic(
        storage.join(config.out, "plan", "config.yaml"),
        yaml.safe_dump(describe(config), sort_keys=False).encode(),
    )


def default_gpus(wanted: float | None) -> float:
    """GPUs of one process: as many as wanted, by default 1 where the cluster has any."""
    if wanted is not None:
        return wanted
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what comes out."""
    packages = ("torch", "timm", "ray", "zarr", "numpy", "numba", "pillow", "simplejpeg", "featup-datasets")
    return {"python": sys.version.split()[0], **{name: version(name) for name in packages}}


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


def stages(
    config: PrecomputeConfig, plan: Plan, layout: Layout, setup: Setup, todo: NDArray[np.int64], gpus: float
) -> ray.data.Dataset:
    """The stages from the units ``todo`` to their receipts, nothing run yet.

    Loading and featurizing must not be fused, or the actor would wait for every unit to be read and decoded: Ray keeps
    stages apart whose resources differ, which the config sees to.
    """
    reference = ray.put((plan, todo, decode_options(config, setup.mean)))
    return (
        ray.data.range(len(todo), override_num_blocks=min(len(todo), _MOST_BLOCKS))
        .map(load_row, fn_kwargs={"fetch": ray.get, "reference": reference}, num_cpus=config.loader_cpus)
        .map_batches(
            Featurizer,
            fn_constructor_args=(config, setup, layout, plan.digest),
            batch_size=1,
            batch_format="numpy",
            num_cpus=config.cpus_per_actor,
            num_gpus=gpus or None,
            # Two calls at once, of which one computes and the other writes.
            compute=ray.data.ActorPoolStrategy(
                size=config.actors,
                max_tasks_in_flight_per_actor=4,
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
        )
    )


def verify(out: str, object_store_mb: int, check_source: int = 8) -> Verification:
    """Re-read the whole store, on all of the cluster's CPUs.

    Args:
        out: the store.
        object_store_mb: memory of Ray's object store where the job starts its own Ray.
        check_source: of so many units, labels are decoded again from the input shards and compared.

    Raises:
        StoreError: there is no store, or no index.
    """
    place = storage.join(out, "plan", "plan.json")
    if read_attributes(out) is None or not storage.exists(place):
        raise StoreError(f"no feature store at {out}; give the folder that was --out")
    plan = Plan.from_json(storage.read_bytes(place), storage.join(out, "plan", "index"))
    report = Verification(units=plan.units, samples=plan.samples)
    report.problems += verify_index(out, plan)
    connect(object_store_mb)
    chosen = set(np.linspace(0, plan.units - 1, min(check_source, plan.units), dtype=int).tolist())
    reference = ray.put((out, plan, chosen))
    rows = ray.data.range(plan.units, override_num_blocks=min(plan.units, _MOST_BLOCKS)).map(
        _verify_row, fn_kwargs={"reference": reference}, num_cpus=1
    )
    for row in rows.iter_rows():
        report.add(Finding.from_row(row))
    return report


@lru_cache(maxsize=2)
def _shared(reference: Any) -> Any:
    """An object of the driver's, fetched once in each worker process."""
    return ray.get(reference)


def _verify_row(row: dict[str, Any], reference: Any) -> dict[str, Any]:
    out, plan, chosen = _shared(reference)
    return verify_unit(out, plan, int(row["id"]), source=int(row["id"]) in chosen).to_row()

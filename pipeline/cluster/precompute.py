"""Chains the stages of a run; the one place that knows Ray Data.

``ray.data.range`` over the units that are left -> load (tasks: read and decode) -> featurize (actors: extract,
upsample, encode, write) -> receipts on the driver. A unit is one row from end to end.
"""

import os
import sys

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from featup.errors import FeatupError
from pipeline.cluster.connect import connect, default_gpus
from pipeline.cluster.featurizer import Featurizer
from pipeline.cluster.planning import MOST_BLOCKS, index_on_ray
from pipeline.cluster.progress import Progress
from pipeline.compute.load import decode_options, load_row
from pipeline.compute.models import Setup
from pipeline.compute.prepare import check_options, complete_plan, create_all, layout_of, plan_input, prepare
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import JobFailedError, PipelineError, StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard
from pipeline.store.index import Summary, write_index
from pipeline.store.layout import Layout, read_attributes
from pipeline.store.ledger import Ledger, Receipt

__all__ = ["precompute", "stages"]


def precompute(config: PrecomputeConfig) -> Summary:
    """The main job: everything from shards to a store with its index. Running it again does only what is left.

    Returns:
        What became of every sample.

    Raises:
        JobFailedError: units failed for good, or too many samples did; all others are in the store.
        StoreMismatchError: ``out`` holds a store made with other options, input or weights.
    """
    config = config.absolute(on_cluster=bool(os.environ.get("RAY_ADDRESS")))
    check_options(config)
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


@ray.remote(max_retries=2)  # type: ignore[untyped-decorator]
def _prepare_remotely(config: PrecomputeConfig, shards: tuple[PlannedShard, ...]) -> Setup:
    return prepare(config, shards)


def _reserved_cpus(config: PrecomputeConfig) -> tuple[float, float]:
    """CPUs of an actor and of a loading task, never the same."""
    actor = config.cpus_per_actor or (0.5 if config.loader_cpus == 1.0 else 1.0)
    return actor, config.loader_cpus or (0.25 if actor == 0.5 else 0.5)


def stages(
    config: PrecomputeConfig, plan: Plan, layout: Layout, setup: Setup, todo: NDArray[np.int64], gpus: float
) -> ray.data.Dataset:
    """The stages from the units ``todo`` to their receipts, nothing run yet.

    Loading and featurizing must not be fused, or the actor would wait for every unit to be read and decoded: Ray keeps
    stages apart whose resources differ, which the config sees to.
    """
    reference = ray.put((plan, todo, decode_options(config, setup.mean)))
    actor_cpus, loader_cpus = _reserved_cpus(config)
    return (
        ray.data.range(len(todo), override_num_blocks=min(len(todo), MOST_BLOCKS))
        .map(load_row, fn_kwargs={"fetch": ray.get, "reference": reference}, num_cpus=loader_cpus)
        .map_batches(
            Featurizer,
            fn_constructor_args=(config, setup, layout),
            batch_size=1,
            batch_format="numpy",
            num_cpus=actor_cpus,
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

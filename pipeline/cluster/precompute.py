"""The main job on Ray Data: chains the stages of a run, and watches over it.

Numbers of the units that are left -> load (tasks: read and decode) -> featurize (actors: extract,
upsample, encode, write) -> receipts on the driver. A unit is one row from end to end.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray

from pipeline.cluster.connect import connect
from pipeline.cluster.faults import ray_errors_in_one_line
from pipeline.cluster.featurizer import Featurizer
from pipeline.cluster.planning import index_on_ray
from pipeline.cluster.preflight import allot_work, check_cores, start_ray
from pipeline.cluster.progress import Progress
from pipeline.cluster.rows import number_rows, read_rows
from pipeline.compute.allotment import Allotment, Work, actor_bytes, peak_bytes
from pipeline.compute.device import threads_restored
from pipeline.compute.load import decode_options, load_row
from pipeline.compute.models import Setup
from pipeline.compute.outcome import failed_unit
from pipeline.compute.prepare import (
    as_stored,
    check_members,
    check_options,
    complete_plan,
    create_or_grow,
    layout_of,
    load_models,
    plan_store,
    prepare,
    units_to_retry,
)
from pipeline.compute.recheck import recheck_input
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import (
    DamagedReceiptError,
    EnvironmentFault,
    JobFailedError,
    Reason,
    StoreError,
    UnitError,
)
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard
from pipeline.store.create import declare_complete, withdraw_complete
from pipeline.store.index import Summary, write_index
from pipeline.store.layout import Layout, finished_attributes, read_attributes
from pipeline.store.lease import Lease
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
from pipeline.store.leftovers import remove_leftovers
from pipeline.store.segments import UNITS_PER_SEGMENT
from pipeline.store.verification import find_plan

__all__ = ["precompute", "stages"]

T = TypeVar("T")
# So many units in a row that fail alike, and not one that succeeds: the fault is not the units'.
_ALIKE = 5
# The slowest unit that a run should bear: Ray Data ends a run in which nothing happens for longer.
_LEAST_PATIENCE = 1800.0
_SECONDS_PER_IMAGE = 5.0
_SECONDS_PER_MULTIVIEW = 30.0
_SECONDS_PER_FIT = {"fast": 300.0, "paper": 14400.0}


def precompute(config: PrecomputeConfig) -> Summary:
    """The main job: everything from shards to a store with its index. Running it again does only what is left.

    Returns:
        What became of every sample.

    Raises:
        JobFailedError: units failed for good, or too many samples did; all others are in the store.
        InputChangedError: an input shard is not the one the store was made from.
        LeaseError: another driver is at work on the store.
        StoreMismatchError: ``out`` holds a store made with other options or weights.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, with a note that says how far the run came.
    """
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    config = as_stored(config.absolute(on_cluster=on_cluster), lambda text: print(text, flush=True))
    check_options(config)
    state = _State()
    with Lease.acquire(config.out) as lease, _ending_in_one_line(state):
        started = not ray.is_initialized()
        try:
            return _run(config, lease, state, on_cluster)
        except BaseException:
            # Nothing writes any more when the lease is given back, and what was under way was stopped, not at fault.
            if started and not on_cluster:
                ray.shutdown()
                # Where the store cannot be reached, what ended the run is the better news.
                with suppress(EnvironmentFault, OSError):
                    Ledger(storage.join(config.out, "ledger")).forgive_attempts()
            raise


@dataclass
class _State:
    """How far a run is, for its last words."""

    units: int = 0
    done: int = 0
    started: bool = False
    failures: dict[int, Receipt] = field(default_factory=dict)
    taken_back: set[int] = field(default_factory=set)


@contextmanager
def _ending_in_one_line(state: _State) -> Iterator[None]:
    try:
        with ray_errors_in_one_line(
            lambda: f"{state.done} of {state.units} units are done, and the same command goes on"
        ):
            yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Ctrl-C or SIGTERM: the job's last line says how far it came.
        done = f"{state.done} of {state.units} units done" if state.started else "before the first unit"
        stop.add_note(f"{done}; the same command goes on")
        raise


def _run(config: PrecomputeConfig, lease: Lease, state: _State, on_cluster: bool) -> Summary:
    # On one machine without GPUs everything up to the units is done in this process, and Ray, whose start takes some
    # seconds, starts when there are units to do.
    alone = not on_cluster and not torch.cuda.is_available()
    given = config
    if alone:
        check_cores(config)
        # Before the input is indexed, which may take minutes: a wrong name is known at once.
        with threads_restored():
            extractor = load_models(config)
    else:
        config, allotment = start_ray(config, on_cluster)
    ledger = Ledger(storage.join(config.out, "ledger"))
    if read_attributes(config.out) is None and storage.list_files(ledger.url):
        raise StoreError(
            f"{config.out} has receipts and no arrays: features.zarr was removed or moved, and the receipts would make "
            "this run leave it empty; put it back, or remove the ledger folder as well"
        )
    # A plan beside no store binds nobody: the run that made it ended before its arrays were there.
    old = find_plan(config.out) if finished_attributes(config.out) is not None else None
    update = plan_store(config, old, index_all=partial(index_on_ray, start=lambda: connect(config.object_store_mb)))
    _retaking(
        config.out,
        ledger,
        state,
        lambda: recheck_input(config, old, update, ledger, lambda text: print(text, flush=True)),
    )
    lease.check()
    if old is None:
        check_members(config, update.shards)
    if alone:
        with threads_restored():
            setup, peak = prepare(config, update.shards, extractor), peak_bytes()
        del extractor
    else:
        remote = _prepare_remotely.options(num_cpus=min(1.0, allotment.cpus), num_gpus=allotment.gpus_per_actor)
        setup, peak = ray.get(remote.remote(config, update.shards))
    plan = complete_plan(config, update.shards, setup.channels)
    layout = layout_of(config, plan.rows_per_shard, setup.channels, plan.units)
    lease.check()
    create_or_grow(given, plan, layout, setup)
    for fault in plan.faults:
        print(f"input fault: {fault}", flush=True)
    if config.retry_failed is not None:
        units = _retaking(config.out, ledger, state, lambda: units_to_retry(config, plan, ledger))
        print(f"{len(units)} units hold failed samples that are tried again", flush=True)
        if units:
            lease.check()
            withdraw_complete(config.out)
            ledger.clear_attempts(units)
            ledger.reopen(units)

    done = ledger.done()
    for segment in done.compactable:
        _compact(config.out, ledger, segment, state)
    done = ledger.done()
    todo = done.todo(plan.units)
    left = sum(len(plan.unit(int(unit))) for unit in todo)
    state.units, state.done, state.started = plan.units, plan.units - len(todo), True
    print(
        f"{config.out}: {plan.samples} samples in {plan.units} units, {state.done} units done before, "
        f"{len(todo)} to do with {left} samples; backbone {config.backbone} on {setup.device}, "
        f"{setup.grid[0]}x{setup.grid[1]} to {config.target_size} by {config.upsampler}, {setup.channels} channels",
        flush=True,
    )
    if len(todo):
        if alone:
            config, _ = start_ray(config, on_cluster)
        work = Work(len(todo), actor_bytes(config, layout, peak), fits=config.per_image)
        config, allotment = allot_work(config, work)
        withdraw_complete(config.out)
        _set_patience(config, plan)
        whole = plan.units // UNITS_PER_SEGMENT
        left_of = Counter(unit // UNITS_PER_SEGMENT for unit in todo.tolist() if unit // UNITS_PER_SEGMENT < whole)
        # Ray Data gives its actors two objects of its own, which the driver keeps until they end, and Ray warns of that
        # in a line that cannot be told from that of a fault.
        print(
            "should Ray print a line about constructor arguments in the object store now: they are Ray Data's own, are "
            "kept as long as this job runs, and do no harm",
            file=sys.stderr,
            flush=True,
        )
        with read_rows(stages(config, plan, layout, setup, todo, allotment)) as rows:
            _follow(rows, Progress(len(todo), left), left_of, config.out, ledger, lease, state)
        remove_leftovers(config.out)
    lease.check()
    summary = _write_index(config, plan, ledger, state)
    lease.check()
    if not state.failures:
        declare_complete(config.out)
    print(summary.text(), flush=True)
    _judge(config, summary)
    return summary


def _retaking(out: str, ledger: Ledger, state: _State, work: Callable[[], T]) -> T:
    """What ``work`` returns, once the receipts that it finds damaged are taken back: each costs its unit alone."""
    while True:
        try:
            return work()
        except DamagedReceiptError as error:
            _take_back(out, ledger, error, state)


def _compact(out: str, ledger: Ledger, segment: int, state: _State) -> None:
    """Compact a segment's receipts; a damaged one is taken back, and costs its unit alone."""
    try:
        ledger.compact(segment)
    except DamagedReceiptError as error:
        _take_back(out, ledger, error, state)


def _take_back(out: str, ledger: Ledger, error: DamagedReceiptError, state: _State) -> None:
    withdraw_complete(out)
    state.taken_back |= {error.unit, *ledger.reopen([error.unit])}
    print(f"unit {error.unit} is taken back and computed anew: {error}", file=sys.stderr, flush=True)


def _write_index(config: PrecomputeConfig, plan: Plan, ledger: Ledger, state: _State) -> Summary:
    def write() -> Summary:
        for unit in sorted(state.taken_back):
            key = plan.unit(unit)
            if unit in state.failures or unit in ledger.done():
                continue
            records = tuple(
                SampleRecord(entry.key, key.row + offset, "ok") for offset, entry in enumerate(plan.unit_samples(key))
            )
            damaged = UnitError(f"{key}: its receipt is damaged and was taken back")
            state.failures[unit] = failed_unit(key, plan.shards[key.shard].digest, records, damaged)
        return write_index(config.out, plan, ledger, state.failures)

    return _retaking(config.out, ledger, state, write)


def _set_patience(config: PrecomputeConfig, plan: Plan) -> None:
    """How long Ray Data may see nothing happen before it ends the run: several of the slowest units."""
    per_image = {
        "implicit": _SECONDS_PER_FIT[config.implicit_preset],
        "multiview": _SECONDS_PER_MULTIVIEW,
    }.get(config.upsampler, _SECONDS_PER_IMAGE)
    patience = max(_LEAST_PATIENCE, 4 * per_image * plan.rows_per_shard)
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = patience


def _follow(
    rows: Iterator[Mapping[str, Any]],
    progress: Progress,
    left_of: Counter[int],
    out: str,
    ledger: Ledger,
    lease: Lease,
    state: _State,
) -> None:
    """Count what comes in, compact receipts, and stop where going on can help nobody.

    Args:
        left_of: units that are left of each segment of the ledger; a segment is compacted when its last one is done.

    Raises:
        JobFailedError: the surroundings or the input are at fault, or every unit fails alike.
        LeaseError: another driver took the store over.
    """
    alike: list[str] = []
    succeeded = False
    with progress:
        for row in rows:
            lease.check()
            receipt = Receipt.from_json(row["receipt"])
            progress.add(receipt)
            if not receipt.error:
                state.done += 1
                given_up = all(record.reason == Reason.UNIT_FAILED for record in receipt.samples)
                succeeded |= not given_up
                alike = [*alike, "given up"][-_ALIKE:] if given_up else []
                _stop_where_all_fail(alike, succeeded, receipt.samples[0].detail)
                segment = receipt.unit.unit // UNITS_PER_SEGMENT
                left_of[segment] -= 1
                if left_of[segment] == 0:
                    _compact(out, ledger, segment, state)
                continue
            if row["fault"] in ("environment", "input"):
                raise JobFailedError(
                    f"{receipt.error}. The job stops here with {state.done} of {state.units} units done, as no other "
                    "unit would fare better"
                )
            state.failures[receipt.unit.unit] = receipt
            print(f"{receipt.unit} failed: {receipt.error}", file=sys.stderr, flush=True)
            alike = [*alike, receipt.error.partition(":")[0]][-_ALIKE:]
            _stop_where_all_fail(alike, succeeded, receipt.error)


def _stop_where_all_fail(alike: list[str], succeeded: bool, text: str) -> None:
    if not succeeded and len(alike) == _ALIKE and len(set(alike)) == 1:
        raise JobFailedError(
            f"the first {_ALIKE} units failed alike, so the job stops; the last by {text}. Mend that, and the same "
            "command goes on"
        )


def _judge(config: PrecomputeConfig, summary: Summary) -> None:
    if summary.failed_units:
        raise JobFailedError(
            f"{len(summary.failed_units)} of {summary.units} units failed: {summary.failed_units[:10]}; the reasons "
            "stand above and in the index. Run the same command again to try only these"
        )
    fraction = summary.failed / max(1, summary.samples)
    if fraction > config.max_failed_fraction:
        raise JobFailedError(
            f"{summary.failed} of {summary.samples} samples failed ({fraction:.2%}), more than "
            f"max_failed_fraction={config.max_failed_fraction:.2%}; the rest is in the store. Look at the reasons "
            "(featup status --failed), then raise the limit, or try them again with --retry-failed"
        )


# One call a process: an idle one would keep its GPU memory beside the actors.
@ray.remote(max_retries=2, max_calls=1)  # type: ignore[untyped-decorator]
def _prepare_remotely(config: PrecomputeConfig, shards: tuple[PlannedShard, ...]) -> tuple[Setup, int]:
    return prepare(config, shards, load_models(config)), peak_bytes()


def stages(
    config: PrecomputeConfig, plan: Plan, layout: Layout, setup: Setup, todo: NDArray[np.int64], allotment: Allotment
) -> ray.data.Dataset:
    """The stages from the units ``todo`` to their receipts, nothing run yet.

    Loading and featurizing must not be fused, or the actor would wait for every unit to be read and decoded: Ray keeps
    stages apart whose resources differ, which the allotment sees to.
    """
    reference = ray.put((plan, todo, decode_options(config, setup.mean), config.out))
    return (
        number_rows(len(todo))
        .map(load_row, fn_kwargs={"fetch": ray.get, "reference": reference}, num_cpus=allotment.loader_cpus)
        .map_batches(
            Featurizer,
            fn_constructor_args=(config, setup, layout, allotment.actors_per_node),
            batch_size=1,
            batch_format="numpy",
            num_cpus=allotment.cpus_per_actor,
            num_gpus=allotment.gpus_per_actor or None,
            # Two calls at once, of which one computes and the other writes.
            compute=ray.data.ActorPoolStrategy(
                size=allotment.actors,
                max_tasks_in_flight_per_actor=4,
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
        )
    )

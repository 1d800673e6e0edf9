"""Verification on all CPUs of a cluster."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import numpy as np
import ray
import ray.data

from pipeline.cluster.connect import connect
from pipeline.cluster.faults import ray_errors_in_one_line
from pipeline.cluster.rows import number_rows, read_rows
from pipeline.compute.source_check import check_source
from pipeline.errors import ConfigError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.progress import CountProgress
from pipeline.store.lease import Lease
from pipeline.store.ledger import Ledger
from pipeline.store.leftovers import find_leftovers
from pipeline.store.segments import UNITS_PER_SEGMENT
from pipeline.store.verification import Verification, repair_store, stored_plan, verify_store
from pipeline.store.verify import Finding, SourceCheck, verify_unit

__all__ = ["verify"]


def verify(
    out: str,
    object_store_mb: int,
    source_units: int = 8,
    repair: bool = False,
    remove_partial: bool = False,
    url_of_shard: Callable[[int], str] | None = None,
) -> Verification:
    """Re-read the whole store, on all of the cluster's CPUs.

    Args:
        out: the store.
        object_store_mb: memory of Ray's object store where the job starts its own Ray.
        source_units: of so many units, labels are decoded again from the input shards and compared.
        repair: set damaged units back, so that the next run computes them anew.
        remove_partial: remove files that a writer began and did not finish.
        url_of_shard: where an input shard lies now, by its number in the plan; by default where the plan says.

    Raises:
        ConfigError: a relative path on a cluster.
        JobFailedError: Ray ended the run.
        StoreError: there is no store, or its plan is damaged.
        LeaseError: a job is at work on the store that is to be repaired.
    """
    if os.environ.get("RAY_ADDRESS") and storage.is_local(out) and not os.path.isabs(storage.local_path(out)):
        raise ConfigError(
            f"{out!r} is a relative path, and other nodes have other working folders; give an absolute one"
        )
    plan = stored_plan(out)
    leftovers = find_leftovers(out)
    with Lease.acquire(out) if repair or remove_partial else nullcontext():
        report = Verification(units=plan.units, samples=plan.samples)
        if leftovers and remove_partial:
            for place in leftovers:
                storage.remove(place)
            report.notes.append(f"{len(leftovers)} leftover .partial files removed")
        else:
            report.problems += [f"{place} is left over from a writer that was killed" for place in leftovers]
        _verify(out, plan, report, object_store_mb, source_units, url_of_shard)
        if repair:
            repair_store(out, report)
        elif report.damaged or report.misindexed:
            report.notes.append("--repair sets damaged units back, for the next run of the job to compute anew")
        return report


def _verify(
    out: str,
    plan: Plan,
    report: Verification,
    object_store_mb: int,
    source_units: int,
    url_of_shard: Callable[[int], str] | None,
) -> None:
    done = Ledger(storage.join(out, "ledger")).done()
    indexed = verify_store(out, plan, done, report)
    units = np.flatnonzero(done.mask(plan.units))
    if not len(units):
        return
    connect(object_store_mb)
    chosen = units[np.linspace(0, len(units) - 1, min(source_units, len(units)), dtype=int)].tolist()
    urls = {
        unit: url_of_shard(shard) if url_of_shard else plan.shards[shard].url
        for unit in chosen
        for shard in [plan.unit(unit).shard]
    }
    reference = ray.put((out, plan, units, urls, indexed))
    dataset = number_rows(len(units)).map(_verify_row, fn_kwargs={"reference": reference}, num_cpus=1)
    progress = CountProgress(len(units), "units")
    with (
        ray_errors_in_one_line(
            lambda: f"{progress.done} of {len(units)} units are verified; run the same command again"
        ),
        read_rows(dataset) as rows,
        progress,
    ):
        for verified, row in enumerate(rows, 1):
            report.add(Finding.from_row(row))
            progress.reach(verified, f"{len(report.problems)} problems")


@lru_cache(maxsize=2)
def _shared(reference: Any) -> Any:
    """An object of the driver's, fetched once in each worker process."""
    return ray.get(reference)


def _verify_row(row: dict[str, Any], reference: Any) -> dict[str, Any]:
    out, plan, units, urls, indexed = _shared(reference)
    unit = int(units[row["id"]])
    source: SourceCheck | None = partial(check_source, url=urls[unit]) if unit in urls else None
    return verify_unit(out, plan, unit, source, unit // UNITS_PER_SEGMENT in indexed).to_row()

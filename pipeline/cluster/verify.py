"""Verification on all CPUs of a cluster."""

from functools import lru_cache
from typing import Any

import numpy as np
import ray
import ray.data

from pipeline.cluster.connect import connect
from pipeline.cluster.planning import MOST_BLOCKS
from pipeline.compute.source_check import check_source
from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.store.layout import read_attributes
from pipeline.store.verify import Finding, Verification, verify_index, verify_unit

__all__ = ["verify"]


def verify(out: str, object_store_mb: int, source_units: int = 8) -> Verification:
    """Re-read the whole store, on all of the cluster's CPUs.

    Args:
        out: the store.
        object_store_mb: memory of Ray's object store where the job starts its own Ray.
        source_units: of so many units, labels are decoded again from the input shards and compared.

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
    chosen = set(np.linspace(0, plan.units - 1, min(source_units, plan.units), dtype=int).tolist())
    reference = ray.put((out, plan, chosen))
    rows = ray.data.range(plan.units, override_num_blocks=min(plan.units, MOST_BLOCKS)).map(
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
    return verify_unit(out, plan, int(row["id"]), check_source if row["id"] in chosen else None).to_row()

"""Time, memory and storage requests of resuming, indexing and opening stores of many units, without their arrays.

A simulated store has the plan, ledger and index of a run in which one segment is open. Each operation runs in a process
of its own: once on the local disk for time and memory, once through a file system that counts requests as an object
store would charge them (a listing is one for each 1,000 names).

python benchmarks/scale.py --units 10000 100000 1000000
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard
from pipeline.loader.dataset import FeatureDataset
from pipeline.store.create import create_store, declare_complete
from pipeline.store.index import index_table, plan_digest, write_index
from pipeline.store.layout import Layout
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
from pipeline.store.partitions import PartitionFacts, write_partition
from pipeline.store.segments import UNITS_PER_SEGMENT, receipt_place, segment_place
from pipeline.store.verification import stored_plan

SAMPLES = 10
UNITS_PER_SHARD = 100
OPERATIONS = ("resume", "open, partial", "index", "open")


class CountingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """The local disk under ``counted://``, which counts requests by kind."""

    protocol = ("counted",)
    cachable = False
    requests: ClassVar[Counter[str]] = Counter()
    _inside: ClassVar[threading.local] = threading.local()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("counted://") if isinstance(path, str) else path)

    @classmethod
    def unstrip_protocol(cls, name: str) -> str:
        return f"counted://{name}"


def counted(name: str) -> Callable[..., Any]:
    def method(self: CountingFileSystem, *args: Any, **kwargs: Any) -> Any:
        inside = getattr(self._inside, "yes", False)
        self._inside.yes = True
        try:
            result = getattr(LocalFileSystem, name)(self, *args, **kwargs)
        finally:
            self._inside.yes = inside
            if not inside:
                pages = len(result) // 1000 if name in ("find", "ls") else 0
                self.requests[name] += 1 + pages
        return result

    return method


for _name in ("info", "cat_file", "pipe_file", "find", "ls", "rm_file", "exists", "open"):
    setattr(CountingFileSystem, _name, counted(_name))
fsspec.register_implementation("counted", CountingFileSystem)


def receipt_of(plan: Plan, unit: int, rng: np.random.Generator) -> Receipt:
    key = plan.unit(unit)
    records = tuple(
        SampleRecord(
            f"images/{unit:09d}-{number}", key.row + number, "ok", source_size=(480, 640), decoder="simplejpeg",
            transform={"kind": "center_crop", "scale": 0.7, "box": [0, 80, 480, 560]}, sha256=rng.bytes(32).hex(),
            label_sha256={"seg": rng.bytes(32).hex()},
        )
        for number in range(len(key))
    )  # fmt: skip
    checksums = {name: rng.integers(0, 2**32, len(key)).tolist() for name in ("features", "seg", "status")}
    seconds = {stage: 0.25 for stage in ("read", "decode", "features", "upsample", "encode_write")}
    return Receipt(key, plan.shards[key.shard].digest, records, checksums, seconds, {"read": 10**6, "stored": 10**7})


def put(receipt: Receipt, url: str) -> None:
    """An open receipt, without the wait for the disk."""
    path = Path(receipt_place(url, receipt.unit.unit))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(receipt.to_json())


def simulate(out: str, units: int) -> None:
    """Plan, ledger and index of a store of so many units, of which the last half segment is to do.

    One segment is written as it should be, and stands under the names of all others; so do the columns of one
    partition, but for rows and units.
    """
    rng = np.random.default_rng(0)
    samples = UNITS_PER_SHARD * SAMPLES
    shards = tuple(
        PlannedShard(f"s3://bucket/images/shard-{number:06d}.tar", 10**9, "1", samples, samples, (), f"{number:064x}")
        for number in range(units // UNITS_PER_SHARD)
    )
    plan = Plan(shards, SAMPLES, "")
    create_store(out, Layout(plan.rows, SAMPLES, 14, 14, 8, (14, 14), (), "uint8", False, 1), {"identity": {}})
    storage.write_atomic(f"{out}/plan/plan.json", plan.to_json())
    ledger = Ledger(f"{out}/ledger")
    receipts = [receipt_of(plan, unit, rng) for unit in range(UNITS_PER_SEGMENT)]
    for receipt in receipts:
        put(receipt, ledger.url)
    ledger.compact(0)
    first = index_table(receipts, plan)
    for number in range(units // UNITS_PER_SEGMENT - 1):
        if number:
            os.link(segment_place(ledger.url, 0), segment_place(ledger.url, number))
        rows = np.arange(len(first)) + number * len(first)
        for name, values in (("row", rows), ("unit", rows // SAMPLES)):
            first = first.set_column(first.schema.get_field_index(name), name, pa.array(values))
        facts = PartitionFacts(plan_digest(plan, number), True, seconds={"read": 250.0}, bytes={"read": 10**9})
        facts.count(first)
        write_partition(out, number, [first], facts)
    for unit in range(units - UNITS_PER_SEGMENT, units - UNITS_PER_SEGMENT // 2):
        put(receipt_of(plan, unit, rng), ledger.url)


def finish(out: str) -> None:
    """What actors do with the units that are left."""
    plan, rng = stored_plan(out), np.random.default_rng(1)
    for unit in Ledger(f"{out}/ledger").done().todo(plan.units).tolist():
        put(receipt_of(plan, unit, rng), f"{out}/ledger")


def operate(operation: str, url: str) -> str:
    """Do what is measured; returns what came of it."""
    if operation == "open":
        return f"{len(FeatureDataset(url))} samples"
    if operation == "open, partial":
        return f"{len(FeatureDataset(url, partial=True))} samples"
    plan, ledger = stored_plan(url), Ledger(storage.join(url, "ledger"))
    if operation == "index":
        return f"{write_index(url, plan, ledger, {}).ok} ok"
    done = ledger.done()
    return f"{len(done)} units done, {len(done.todo(plan.units))} to do"


def measure(operation: str, url: str) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    result = operate(operation, url)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    requests = dict(CountingFileSystem.requests)
    return {"result": result, "seconds": seconds, "before": before / 1024, "peak": peak / 1024, "requests": requests}


def apart(operation: str, url: str) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--operation", operation, "--url", url]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", help="where the simulated stores are written; by default a temporary folder")
    parser.add_argument("--operation", choices=OPERATIONS, help="measure this alone, in this process")
    parser.add_argument("--url", help="on this store")
    args = parser.parse_args()
    if args.operation:
        print(json.dumps(measure(args.operation, args.url)))
        return
    print("| units | operation | seconds | peak MiB (of it imports) | requests | by kind | result |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for units in args.units:
        folder = tempfile.mkdtemp(prefix="scale-", dir=args.folder)
        out = f"{folder}/out"
        started = time.perf_counter()
        simulate(out, units)
        print(f"simulated {units} units in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        for operation in OPERATIONS:
            if operation == "index":
                finish(out)
            if operation == "open":
                declare_complete(out)
            local, remote = apart(operation, out), apart(operation, f"counted://{out}")
            kinds = ", ".join(f"{name} {count}" for name, count in sorted(remote["requests"].items()))
            print(
                f"| {units:,} | {operation} | {local['seconds']:.2f} | {local['peak']:.0f} ({local['before']:.0f}) | "
                f"{sum(remote['requests'].values())} | {kinds} | {local['result']} |",
                flush=True,
            )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

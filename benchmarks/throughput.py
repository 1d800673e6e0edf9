"""Images a second of the whole job against its stages alone, and peak memory, in one run.

    python benchmarks/throughput.py --limits 50 400 -- --shards 'camvid/*.tar' --backbone mobilenetv1_100 ...

Everything behind ``--`` is given to ``jobs.precompute``. Stages are timed alone, one after the other, in this process;
then the job runs once for each limit, as a process of its own, while its processes' memory is watched.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from pipeline.compute.load import LoadedUnit, decode_options, load_unit
from pipeline.compute.prepare import complete_plan, create_or_grow, layout_of, load_models, plan_input, prepare
from pipeline.compute.unit import UnitProcessor
from pipeline.config.parser import parse_args
from pipeline.config.precompute import PrecomputeConfig
from pipeline.inputs.plan import UnitKey

CPU_BOUND = "all, with every core always busy"


def main() -> None:
    own, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", type=int, nargs="+", default=[50, 400], help="images of each run of the job")
    parser.add_argument("--alone", type=int, default=64, help="images each stage alone is timed on")
    args = parser.parse_args(own.split())
    words = sys.argv[sys.argv.index("--") + 1 :] if rest else []
    with tempfile.TemporaryDirectory(prefix="featup-bench-") as folder:
        config, _ = parse_args(PrecomputeConfig, [*words, "--out", f"{folder}/alone"], description="")
        alone = stages_alone(replace(config, limit=args.alone))
        print("| stage alone | images/s |\n| --- | --- |")
        for name, pace in alone.items():
            print(f"| {name} | {pace:.1f} |")
        slowest = min(list(alone.values())[:3])
        bound = alone[CPU_BOUND]
        print(
            "\n| images | images/s, steady | of slowest stage | of the cores' bound | wall s | actor MB | driver MB "
            "| object store MB |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
        )
        for limit in args.limits:
            out = Path(folder, f"run-{limit}")
            pace, wall, peaks = watch([*words, "--limit", str(limit), "--out", str(out)], out)
            memory = " | ".join(f"{peaks.get(name, 0) / 1e6:.0f}" for name in ("actor", "driver", "store"))
            print(
                f"| {limit} | {pace:.1f} | {pace / slowest:.2f} | {pace / bound:.2f} | {wall:.1f} | {memory} |",
                flush=True,
            )
            shutil.rmtree(out)


def processor_seconds() -> float:
    """Processor time of this process and of its children, one of which decodes."""
    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


def stages_alone(config: PrecomputeConfig) -> dict[str, float]:
    """Images a second of loading, of computing, and of encoding and writing, each on its own.

    Where there is no accelerator the stages share the cores; what these could do at best follows from the processor
    time that all stages take together.
    """
    shards = plan_input(config)
    setup = prepare(config, shards, load_models(config))
    plan = complete_plan(config, shards, setup.channels)
    layout = layout_of(config, plan.rows_per_shard, setup.channels, plan.units)
    create_or_grow(config, plan, layout, setup)
    processor = UnitProcessor(config, setup, layout)
    options = decode_options(config, setup.mean)
    units: list[tuple[UnitKey, LoadedUnit]] = []
    started, worked = time.perf_counter(), processor_seconds()
    for number in range(plan.units):
        units.append((plan.unit(number), load_unit(plan, plan.unit(number), options)))
    loading, worked = time.perf_counter() - started, processor_seconds() - worked
    processor.compute(units[0][1], {})  # kernels compile once
    worked -= processor_seconds()
    seconds: dict[str, float] = {}
    for key, loaded in units:
        receipt = processor.process(key, loaded).receipt
        for name, value in receipt.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    worked += processor_seconds()
    computing = seconds["features"] + seconds["upsample"]
    writing = seconds["encode_write"] + seconds["checksum"]
    return {
        "read + decode (1 process)": plan.samples / loading,
        f"features + upsample ({processor.threads} threads)": plan.samples / computing,
        f"encode + write ({processor.threads} threads)": plan.samples / writing,
        "all, one after the other": plan.samples / (loading + computing + writing),
        CPU_BOUND: len(os.sched_getaffinity(0)) * plan.samples / worked,
    }


def watch(words: list[str], out: Path) -> tuple[float, float, dict[str, int]]:
    """Run the job; images a second over the second half of the units, seconds in all, and peaks of memory in bytes."""
    started = time.perf_counter()
    job = subprocess.Popen([sys.executable, "-m", "jobs.precompute", *words], stdout=subprocess.PIPE, text=True)
    peaks: dict[str, int] = {}
    while job.poll() is None:
        for process in [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]:
            try:
                name, memory = " ".join(process.cmdline()), process.memory_info()
            except psutil.Error:
                continue
            kind, size = "", memory.rss
            if process.pid == job.pid:
                kind = "driver"
            elif "Featurizer" in name:
                kind, size = "actor", memory.rss - memory.shared  # shared: the object store, counted on its own
            elif "raylet/raylet" in name:
                kind, size = "store", memory.shared
            if kind:
                peaks[kind] = max(peaks.get(kind, 0), size)
        time.sleep(1.0)  # looking at every process takes processor time from those looked at
    wall = time.perf_counter() - started
    text = job.stdout.read() if job.stdout else ""
    if job.returncode:
        raise SystemExit(f"the job failed:\n{text}")
    receipts = sorted((path.stat().st_mtime, path) for path in (out / "ledger").glob("[0-9]*/*.json"))
    samples = [len(json.loads(path.read_bytes())["samples"]) for _, path in receipts]
    # The second half: Ray starts more loading processes while the first units are under way.
    half = len(receipts) // 2
    return sum(samples[half:]) / (receipts[-1][0] - receipts[half - 1][0]), wall, peaks


if __name__ == "__main__":
    main()

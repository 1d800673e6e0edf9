"""Seconds and peak memory of AnyUp against dense attention with a mask, each in a process of its own.

    python benchmarks/anyup.py [--sizes 224 448] [--threads 1]

The dense attention is that of the original: every position to every coarse cell, in ``torch.nn.MultiheadAttention``.
The weights are random: the table shows speed and memory only. Patch 14, 384 channels.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numba
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Of a checkout: the dense oracle is the tests'.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=["ours", "dense"], help="measure one way at the first size, in this process")
    args = parser.parse_args()
    if args.one:
        print(*_measure(args.one, args.sizes[0], args.threads))
        return
    print(f"load {os.getloadavg()[0]:.1f}, {args.threads} threads")
    print("| size | way | seconds | peak, times the output |\n| --- | --- | --- | --- |")
    for size in args.sizes:
        for way in ("ours", "dense"):
            command = [sys.executable, __file__, "--one", way, "--sizes", str(size), "--threads", str(args.threads)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds, peak = run.stdout.split() if run.returncode == 0 else (f"exit status {run.returncode}", "")
            print(f"| {size} | {way} | {seconds} | {peak} |", flush=True)


def _measure(way: str, size: int, threads: int) -> tuple[str, str]:
    from featup.upsamplers import AnyUp
    from tests.featup.upsamplers.test_anyup import dense

    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    anyup = AnyUp().eval().requires_grad_(False)
    upsample = anyup if way == "ours" else lambda *inputs: dense(anyup, *inputs)
    with torch.inference_mode():
        upsample(torch.randn(1, 4, 4, 384), torch.zeros(1, 56, 56, 3, dtype=torch.uint8), (56, 56))
        image = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8)
        features = torch.randn(1, size // 14, size // 14, 384)
        before, started = _peak(), time.perf_counter()
        result = upsample(features, image, (size, size))
        seconds = time.perf_counter() - started
    return f"{seconds:.2f}", f"{(_peak() - before) / result.nbytes:.2f}"


def _peak() -> int:
    """Most bytes of memory that this process has held."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()

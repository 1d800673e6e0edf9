"""Kills random processes of the main job at random times, on disk or on an S3 server, and writes what came of it.

    python -m benchmarks.random_kills --kills 50
    python -m benchmarks.random_kills --s3 --kills 10

Each store is filled under up to five kills (of the driver, the actor, a loader, in random order), and must then be
clean, complete and byte-equal to one that was made without interruption. The seeds stand in the table: ``--seed N``
starts from that one again.
"""

import argparse
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import ray

from tests.e2e.objectstore import Faults, ObjectStore, object_store
from tests.e2e.random_kills import (
    KINDS,
    TITLES,
    UNITS,
    Campaign,
    Kill,
    OnDisk,
    OnS3,
    Place,
    table,
    uninterrupted,
    write_shards,
)

KILLS_PER_STORE = 5
FAULTS = Faults(internal_error=0.02, slow_down=0.02, reset=0.02, lost=0.02, slow=0.02, truncated=0.02)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many processes to kill")
    parser.add_argument("--s3", action="store_true", help="on an S3 server behind a proxy that injects faults")
    parser.add_argument("--seed", type=int, default=1, help="of the first store; each further one has the next")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=["driver", *TITLES], help="what to kill")
    parser.add_argument("--out", type=Path, help="file for the Markdown; by default it is printed only")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="featup-kills-"))
    kills, failures, counts = [], [], ""
    started = time.monotonic()
    with ExitStack() as stack:
        paths = write_shards(folder / "shards")
        expected = uninterrupted(str(folder / "shards" / "kill-*.tar"), folder / "whole")
        shards, server = str(folder / "shards" / "kill-*.tar"), None
        if args.s3:
            server = stack.enter_context(object_store(folder / "server.log", FAULTS, args.seed))
            for path in paths:
                server.upload(path, f"in/{path.name}")
            shards = "s3://featup/in/kill-*.tar"
        seed = args.seed
        # Of each kind as many, in random order; a kill whose time does not come in one store is left for the next.
        queue = list(args.kinds) * -(-args.kills // len(args.kinds))
        random.Random(args.seed).shuffle(queue)
        while len(kills) < args.kills:
            campaign = Campaign(_place(server, folder, seed), shards, seed, folder / f"logs-{seed}")
            try:
                campaign.run(queue[: min(KILLS_PER_STORE, args.kills - len(kills))], expected)
            except AssertionError as error:
                failures.append(f"seed {seed}: {error}")
                print(f"FAILED, seed {seed}: {error}", file=sys.stderr, flush=True)
            kills += campaign.kills
            queue = queue[len(campaign.kills) :]
            print(table(campaign.kills), flush=True)
            seed += 1
        if server:
            counts = f"\nRequests: {_words(server.proxy.requests)}; faults injected: {_words(server.proxy.injected)}.\n"
    text = _report(args, kills, seed - args.seed, len(failures), time.monotonic() - started, counts)
    print(text)
    if args.out:
        args.out.write_text(text)
    if failures:
        print(f"{len(failures)} stores were not as they must be; everything is kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


def _place(server: ObjectStore | None, folder: Path, seed: int) -> Place:
    return OnS3(server, f"out-{seed}") if server else OnDisk(folder / f"out-{seed}")


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _report(
    args: argparse.Namespace, kills: Sequence[Kill], stores: int, failed: int, seconds: float, counts: str
) -> str:
    where = "on moto's S3 server, behind a proxy that injects faults" if args.s3 else "on disk"
    command = " ".join(["python -m benchmarks.random_kills", *(["--s3"] if args.s3 else []), f"--kills {args.kills}"])
    lines = [
        f"## {len(kills)} random kills {where}",
        "",
        f"```\n{command} --seed {args.seed}\n```",
        "",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), Ray {ray.__version__}; "
        f"{stores} stores of {UNITS} units in {seconds / 60:.0f} minutes; {stores - failed} stores clean, complete and "
        f"byte-equal to an uninterrupted run, {failed} not.",
        counts,
        "| killed | kills | units done at the kill | s to the next unit, median (most) | s to the end, median (most) | "
        "done units recomputed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in args.kinds:
        those = [kill for kill in kills if kill.kind == kind]
        if those:
            lines.append(
                f"| {kind} | {len(those)} | {min(k.done for k in those)} to {max(k.done for k in those)} | "
                f"{_spread([k.next_receipt for k in those])} | {_spread([k.finished for k in those])} | "
                f"{sum(k.recomputed for k in those)} |"
            )
    return "\n".join([*lines, "", "Every kill, in order:", "", table(kills), ""])


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())

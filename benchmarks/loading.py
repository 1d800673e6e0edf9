"""Reading for training: a store against one .npy file per image, side by side in one run.

Every loop is a process of its own that reads all images once to have them in the page cache, then once to be timed, and
gives batches of float32 features with int64 labels. With --cold the files are taken out of the page cache before the
pass that is timed, as those of a data set larger than the memory are. Rounds go through all loops in turn.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.loader import FeatureDataset

BATCH = 8
LOOPS = ("npy", "npy, mapped", "store")


class NpyFiles(Dataset[dict[str, Tensor]]):
    """What people write: a file of features and one of labels per image."""

    def __init__(self, folder: str, crop: int | None, mapped: bool) -> None:
        self.features = sorted(Path(folder).glob("*.features.npy"))
        self.crop = crop
        self.mode: Any = "r" if mapped else None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.features[index]
        features = np.load(path, mmap_mode=self.mode)
        seg = np.load(str(path).replace(".features.", ".seg."), mmap_mode=self.mode)
        if self.crop is not None:
            top = int(torch.randint(features.shape[0] - self.crop + 1, ()))
            left = int(torch.randint(features.shape[1] - self.crop + 1, ()))
            window = (slice(top, top + self.crop), slice(left, left + self.crop))
            features, seg = features[window], seg[window]
            if torch.rand(()) < 0.5:
                features, seg = features[:, ::-1], seg[:, ::-1]
        # Mapped or mirrored memory is copied before torch takes it.
        parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in (features, seg)]
        return {"features": parts[0].float(), "seg": parts[1].long()}


def write_npy(store: str, folder: Path) -> None:
    """The store's samples as .npy files, float16 and uint8 as they are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = FeatureDataset(store, ["features", "seg"], dtype=torch.float16)
    for index in range(len(dataset)):
        place = folder / f"{index:06d}.features.npy"
        if not place.exists():
            sample = dataset[index]
            np.save(str(place).replace(".features.", ".seg."), sample["seg"].numpy().astype(np.uint8))
            np.save(place, sample["features"].numpy())


def evict(folder: str) -> None:
    """Take the files below a folder out of the page cache."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def time_loop(loop: str, store: str, folder: str, crop: int | None, workers: int, cold: bool) -> dict[str, float]:
    """Images per second and CPU milliseconds per image of one pass over all images."""
    torch.set_num_threads(1)
    dataset: Dataset[Any]
    if loop.startswith("npy"):
        dataset = NpyFiles(folder, crop, "mapped" in loop)
    else:
        size = None if crop is None else (crop, crop)
        dataset = FeatureDataset(store, ["features", "seg"], crop=size, flip=0.5 if crop else 0.0, keys=False)
    loader = DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    for _ in loader:
        pass
    if cold:
        evict(folder if loop.startswith("npy") else f"{store}/features.zarr")
    pids = [os.getpid(), *(worker.pid for worker in getattr(loader._iterator, "_workers", []))]
    began, cpu = time.perf_counter(), sum(map(cpu_seconds, pids))
    images = 0
    for batch in loader:
        images += len(batch["features"])
    seconds = time.perf_counter() - began
    return {"images_s": images / seconds, "cpu_ms": (sum(map(cpu_seconds, pids)) - cpu) / images * 1e3}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    if pid == os.getpid():
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", nargs="+", required=True, help="complete stores with seg")
    parser.add_argument("--npy", required=True, help="folder for the .npy files of the stores")
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        loop, store, crop, workers = json.loads(args.loop)
        print(json.dumps(time_loop(loop, store, str(Path(args.npy) / Path(store).name), crop, workers, args.cold)))
        return
    print("| store | read | workers | " + " | ".join(LOOPS) + " |")
    print("| --- | --- | ---: |" + " ---: |" * len(LOOPS))
    for store in args.store:
        write_npy(store, Path(args.npy) / Path(store).name)
        for crop in (None, args.crop):
            for workers in args.workers:
                results: dict[str, list[dict[str, float]]] = {loop: [] for loop in LOOPS}
                for _ in range(args.rounds):
                    for loop in LOOPS:
                        task = json.dumps([loop, store, crop, workers])
                        command = [sys.executable, *sys.argv, "--loop", task]
                        run = subprocess.run(command, check=True, capture_output=True, text=True)
                        results[loop].append(json.loads(run.stdout))
                cells = [
                    f"{statistics.median(one['images_s'] for one in of):.0f} /s, "
                    f"{statistics.median(one['cpu_ms'] for one in of):.1f} ms"
                    for of in results.values()
                ]
                read = "whole" if crop is None else f"{crop}x{crop} crop, flip"
                print(f"| {Path(store).name} | {read} | {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

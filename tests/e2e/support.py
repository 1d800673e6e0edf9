"""Runs jobs as a user would: own processes, own Ray, real files."""

import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# A real timm ViT with patch 16, made by timm for tests: 0.4 million parameters, random here.
TINY = (
    *("--backbone", "test_vit", "--pretrained", "false", "--size", "64", "--object-store-mb", "100"),
    # Most tests are not about actors, and every actor is one more process that imports torch and timm.
    *("--actors", "1"),
)


def environment() -> dict[str, str]:
    """The environment jobs run in: this project's Python first, no cluster, one OpenMP thread less to fight over."""
    values = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return values | {"PATH": f"{Path(sys.executable).parent}:{values['PATH']}", "PYTHONPATH": str(ROOT)}


def start(name: str, *args: object, log: Path, variables: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start ``python -m jobs.NAME`` with its output in a file, and with more variables in its environment."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", f"jobs.{name}", *map(str, args)],
            cwd=ROOT,
            env=environment() | dict(variables or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def run(name: str, *args: object, status: int = 0, variables: Mapping[str, str] | None = None) -> str:
    """Run ``python -m jobs.NAME`` to its end and return what it printed; the exit status must be ``status``."""
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *map(str, args)],
        cwd=ROOT,
        env=environment() | dict(variables or {}),
        capture_output=True,
        text=True,
        timeout=240,
    )
    text = done.stdout + done.stderr
    assert done.returncode == status, f"exit status {done.returncode}, expected {status}:\n{text[-6000:]}"
    return text


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def photograph(seed: int, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    """A picture with edges and texture, uint8 ``[H, W, 3]``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([(x * 3) % 256, (y * 4) % 256, np.full(size, 40 * (seed % 6))], -1).astype(float)
    for _ in range(4):
        top, left = rng.integers(0, size[0] - 10), rng.integers(0, size[1] - 10)
        pixels[top : top + 20, left : left + 25] = rng.integers(0, 256, 3)
    return (pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    """Pixels as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of (name, bytes) in this order, names repeated if they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_files(path: Path) -> dict[str, bytes]:
    """Every file of a tar, by name."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def good_sample(key: str, seed: int, size: tuple[int, int] = (60, 80)) -> list[tuple[str, bytes]]:
    """A photograph with its class map."""
    pixels = photograph(seed, size)
    labels = (pixels[..., 0] // 32).astype(np.uint8)
    return [(f"{key}.jpg", encode(pixels)), (f"{key}.seg.png", encode(labels, "PNG"))]


def array_files(store: Path) -> dict[str, bytes]:
    """Every file of every array of a store, by name; the group's own attributes hold the store's path and are left."""
    root = store / "features.zarr"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.glob("*/**/*") if p.is_file()}


def receipts(store: Path) -> list[Path]:
    """The receipts a store has now."""
    return sorted((store / "ledger").glob("[0-9]*/*.json"))

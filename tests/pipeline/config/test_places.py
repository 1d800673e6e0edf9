"""Places that options name, looked for before anything heavy is imported."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.places import check_places
from pipeline.config.precompute import PrecomputeConfig
from pipeline.config.predict import PredictConfig
from pipeline.config.probe import ProbeConfig
from pipeline.config.train import TrainConfig
from pipeline.errors import EnvironmentFault, InputError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tar, a folder, a file and a store."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar", "weights.pth"):
        Path(name).write_bytes(b"")
    for name in ("photos", "masks", "store/features.zarr"):
        Path(name).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "read_only"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        place.chmod(0o555)
        if os.access(place, os.W_OK):
            pytest.skip("as root, and without a right to mount, no folder is read-only")
    yield place
    subprocess.run(["umount", str(place)], capture_output=True)


SHARDS: dict[str, Any] = {"shards": ("a.tar",), "out": "out"}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (PrecomputeConfig(**SHARDS, weights="none.pth"), "weights: there is no file at none.pth"),
        (PrecomputeConfig(**SHARDS, pca_from="none"), "pca_from: there is no store at none"),
        (
            PrecomputeConfig(**SHARDS, upsampler="jbu", checkpoint="none.ckpt"),
            "checkpoint: there is no file at none.ckpt",
        ),
        (
            TrainConfig(
                **SHARDS,
                upsampler="anyup",
                objective="crops",
                also_backbones=("resnet18", "vit_tiny_patch16_224=/none.pth"),
            ),
            "also_backbones: there is no file at /none.pth",
        ),
        (PrecomputeConfig(images=("photos", "none"), out="o"), "images: there is no file or folder at none"),
        (
            PrecomputeConfig(images=("photos",), out="o", labels=("seg",), label_dir=("seg=none",)),
            "label_dir: there is no folder at none",
        ),
        (PrecomputeConfig(shards=("none-*.tar",), out="o"), "pattern 'none-*.tar' matches no file"),
        (PrecomputeConfig(shards=("photos",), out="o"), "photos is a folder, and a tar file is wanted"),
        (TrainConfig(**SHARDS, weights="none.pth"), "weights: there is no file at none.pth"),
        (PredictConfig(probe="none.safetensors", images=("photos",), out="o"), "probe: there is no file at none.safe"),
        (ProbeConfig(store="photos", out="p.safetensors", classes=3), "store: there is no store at photos"),
        (ProbeConfig(store="none", out="p.safetensors", classes=3), "store: there is no store at none"),
        (
            ProbeConfig(store="store", val_store="none", out="p.safetensors", classes=3),
            "val_store: there is no store at none",
        ),
        (
            EvaluateConfig(
                out="o", train=("a.tar",), val=("a.tar",), classes=3, rows=("bilinear", "jbu=none.safetensors")
            ),
            "rows: there is no file at none.safetensors",
        ),
        (
            EvaluateConfig(
                out="o", train=("a.tar",), val=("a.tar",), classes=3, rows=("multiview=none.safetensors:4",)
            ),
            "rows: there is no file at none.safetensors",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_there_is_named(here: Path, config: Any, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        check_places(config)


def test_what_is_there_passes_and_urls_and_missing_tars_are_left_to_who_reads_them(here: Path) -> None:
    check_places(PrecomputeConfig(**SHARDS, weights="weights.pth", pca_from="store"))
    check_places(PrecomputeConfig(images=("photos",), out="o", labels=("seg",), label_dir=("seg=masks",)))
    check_places(PrecomputeConfig(shards=("a.tar", "gone-{0..1}.tar"), out="deep/below/out"))
    url = "s3://no-such-bucket/x"
    check_places(PrecomputeConfig(shards=(f"{url}-*.tar",), out=url, weights=f"{url}.pth", pca_from=url))
    rows = ("bilinear", "large_image", "implicit=paper", "multiview=bilinear:4", "multiview")
    check_places(EvaluateConfig(out="o", train=("a.tar",), val=("a.tar",), classes=3, rows=rows))


def test_a_place_that_cannot_be_written_is_known_at_once(here: Path, read_only: Path) -> None:
    out = read_only / "new" / "out"
    with pytest.raises(EnvironmentFault, match=re.escape(f"out: {out} cannot be written, as {read_only} is read-only")):
        check_places(PrecomputeConfig(shards=("a.tar",), out=str(out)))
    assert not out.exists()


def test_jobs_look_for_them_before_they_import_what_takes_seconds(here: Path) -> None:
    """A typo took 13 to 18 s."""
    jobs = {
        "precompute": ["--shards", "a.tar", "--out", "o", "--weights", "none"],
        "train": ["--shards", "a.tar", "--out", "o", "--weights", "none"],
        "train_probe": ["--store", "none", "--out", "p.safetensors", "--classes", "3"],
        "predict": ["--probe", "none", "--images", "photos", "--out", "o"],
        "evaluate": ["--train", "none-*", "--val", "a.tar", "--classes", "3", "--out", "o", "--rows", "bilinear"],
    }
    code = f"""
import sys
from importlib import import_module
for name, words in {jobs!r}.items():
    assert import_module("jobs." + name).main(words) == 1, name
heavy = {{"torch", "ray", "timm", "numba", "zarr"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(jobs)
    assert all("none" in line for line in lines)

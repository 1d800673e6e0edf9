"""A folder with the files that README's commands name, and an environment in which they need no network."""

import hashlib
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save

from featup._timm import timm
from tests.e2e import support

__all__ = ["HUB_MODELS", "command_path", "make_files", "make_hub"]

# Models that README's commands download.
HUB_MODELS = ("vit_small_patch14_dinov2.lvd142m",)
_SIZE = (240, 320)
# What of a checkout ``make`` and ``ray job submit --working-dir .`` use.
_CHECKOUT = ("Makefile", "pyproject.toml", "constraints.txt", ".gitignore", "featup", "pipeline", "jobs")


def make_files(folder: Path) -> None:
    """A checkout without its tests, with photographs and shards of labelled ones: 10 to train on and 3 beside."""
    for name in _CHECKOUT:
        source = support.ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    names = ["photo", "cat", "photos/IMG_1", "photos/more/IMG_2", "holiday/beach", "holiday/hills"]
    for number, name in enumerate(names):
        path = folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(support.encode(support.photograph(50 + number, _SIZE)))
    for name, numbers in {"train-0000": range(5), "train-0001": range(5, 10), "val-0000": range(10, 13)}.items():
        samples = [support.good_sample(f"img_{number:04d}", number, _SIZE) for number in numbers]
        support.write_tar(folder / "data" / f"{name}.tar", [member for sample in samples for member in sample])


def make_hub(folder: Path, models: Sequence[str] = HUB_MODELS) -> dict[str, str]:
    """A cache of the Hugging Face hub with timm's models in it, of random weights; the variables that name it.

    Its layout is the hub's own, so that timm finds weights as it does after a download, and needs no network.
    """
    for name in models:
        torch.manual_seed(0)
        state = timm.create_model(name).state_dict()
        data = save({key: value.half() if value.is_floating_point() else value for key, value in state.items()})
        digest, commit = hashlib.sha256(data).hexdigest(), hashlib.sha1(data, usedforsecurity=False).hexdigest()
        repository = folder / "hub" / f"models--timm--{name}"
        for part in ("blobs", "refs", f"snapshots/{commit}"):
            (repository / part).mkdir(parents=True)
        (repository / "blobs" / digest).write_bytes(data)
        (repository / "refs/main").write_text(commit)
        (repository / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


def command_path(folder: Path, path: str) -> str:
    """A ``PATH`` on which ``featup`` is this checkout's: the installed one, where that is of this checkout.

    Args:
        folder: for a command that runs this checkout, where another one is installed.
        path: the ``PATH`` so far.
    """
    installed = find_spec("featup_jobs")
    if installed and installed.origin and Path(installed.origin).resolve().parent == support.ROOT / "jobs":
        return path
    command = folder / "featup"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from jobs.cli import main; exit(main())" "$@"\n')
    command.chmod(0o755)
    return f"{folder}:{path}"

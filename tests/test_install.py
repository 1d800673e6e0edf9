"""What is installed: extras, packages, and that a store is read with the base dependencies alone."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.store.create import create_store
from pipeline.store.layout import FAILED, OK
from pipeline.store.writer import StoreWriter
from tests.pipeline.store.support import finish_store
from tests.pipeline.store.test_layout import IDENTITY, KEYS, LAYOUT, unit_blocks

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# Reads a store and prints the shapes of what was read.
READ = """
import json, sys
from pipeline.loader import FeatureDataset
from torch.utils.data import DataLoader
url = sys.argv[1]
dataset = FeatureDataset(url, ["features", "seg"])
batch = next(iter(DataLoader(dataset, batch_size=2)))
crop = FeatureDataset(url, window=(0, 0, 2, 2))[0]["features"]
print(json.dumps([len(dataset), list(batch["features"].shape), list(crop.shape), str(batch["seg"].dtype)]))
"""


def brought_by(requirements: list[str]) -> set[str]:
    """The distributions that requirements bring, with what these require, as they are installed here."""
    found: set[str] = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in found or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            queue += [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue  # of another platform: torch's CUDA wheels
        found.add(name)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as the base install would have it: links to what its distributions brought here."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name in brought_by(PROJECT["dependencies"]):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            (folder / top).symlink_to(str(found.locate_file(top)))
    for top in ("featup", "pipeline"):
        (folder / top).symlink_to(ROOT / top)
    return folder


def run_in(base: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, *args],
        cwd=base.parent, env=os.environ | {"PYTHONPATH": str(base)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_what_the_base_install_lacks_is_named_with_the_extra_that_brings_it(base: Path) -> None:
    process = run_in(base, "import featup\nfeatup.load")
    assert process.returncode != 0
    assert "featup.load needs timm, which is not installed" in process.stderr, process.stderr[-2000:]
    assert "pip install 'featup-datasets[make]'" in process.stderr


def test_a_store_is_read_with_the_base_dependencies_alone(base: Path, tmp_path: Path) -> None:
    url = str(tmp_path)
    create_store(url, LAYOUT, IDENTITY)
    statuses = ((OK, FAILED, OK, OK), (OK, OK, FAILED))
    for number, status in enumerate(statuses):
        StoreWriter(url, LAYOUT).write(KEYS[number], unit_blocks(LAYOUT, status, number))
    finish_store(url, statuses)
    done = run_in(base, READ, url)
    assert done.returncode == 0, done.stderr
    height, width, channels = LAYOUT.height, LAYOUT.width, LAYOUT.channels
    assert json.loads(done.stdout) == [5, [2, height, width, channels], [2, 2, channels], "torch.int64"]


@pytest.mark.parametrize("package", ["ray", "timm", "jsonargparse", "PIL", "simplejpeg", "numba", "zarrs", "s3fs"])
def test_the_base_brings_nothing_that_only_making_a_store_needs(base: Path, package: str) -> None:
    assert f"No module named '{package}'" in run_in(base, f"import {package}").stderr


def test_a_job_without_its_packages_names_the_extra(base: Path) -> None:
    (base / "jobs").symlink_to(ROOT / "jobs")
    done = run_in(base, "from jobs.cli import main; raise SystemExit(main(['precompute', '--dry-run']))")
    assert done.returncode == 1
    expected = "precompute: the package 'jsonargparse' is not installed; pip install 'featup-datasets[make]'\n"
    assert done.stderr == expected


def test_the_packages_that_are_installed_are_those_of_the_tree() -> None:
    """A folder that is missing from the list would be missing from every install that is not editable."""
    listed: list[str] = PYPROJECT["tool"]["setuptools"]["packages"]
    folders = [path.parent for top in ("featup", "pipeline", "jobs") for path in (ROOT / top).rglob("*.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(listed) == sorted("featup_jobs" if name == "jobs" else name for name in names)
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == {"featup_jobs": "jobs"}
    assert "jobs" not in listed, "not a name to take in site-packages"


def test_the_jobs_name_themselves_only_relatively() -> None:
    """They are ``jobs`` in a checkout and ``featup_jobs`` where they are installed."""
    for path in (ROOT / "jobs").glob("*.py"):
        text = path.read_text()
        assert "from jobs" not in text, path.name
        assert "import jobs" not in text, path.name


def test_the_package_is_typed() -> None:
    data: dict[str, list[str]] = PYPROJECT["tool"]["setuptools"]["package-data"]
    for package, files in data.items():
        assert files == ["py.typed"]
        assert (ROOT / package / "py.typed").is_file()


def test_the_development_install_brings_all_that_is_tested() -> None:
    (own,) = [requirement for text in EXTRAS["dev"] if (requirement := Requirement(text)).name == PROJECT["name"]]
    assert own.extras == {"make", "demo", "s3", "hf", "video"}


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"gcs", "gpu"}))
def test_every_version_that_is_required_is_pinned_for_the_tests(extra: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    for text in [*PROJECT["dependencies"], *EXTRAS[extra]]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pin), f"{text} with {pin}"


def test_public_names_are_there() -> None:
    import pipeline

    for name in pipeline.__all__:
        if name not in ("precompute", "verify"):  # these import Ray
            assert getattr(pipeline, name).__name__ == name
    assert set(pipeline._MODULES) == set(pipeline.__all__) <= set(dir(pipeline))
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'nothing'"):
        _ = pipeline.nothing
    assert np.prod(pipeline.Size(3, 4)) == 12

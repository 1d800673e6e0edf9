"""A store of this format, in the hands of a later program: another format number, one more option."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import support
from tests.e2e.in_process import run
from tests.e2e.support import array_files, good_sample, write_tar

# A program whose format is one further. The store's program did not know `label_orientation`, `recheck_share` nor
# `store_image` (it stored none), and its layout and receipts lacked fields that have been added since.
LATER = """
import sys
import pipeline.store.layout as layout
layout.FORMAT_VERSION += 1
"""
COMMAND = "from jobs.cli import main; sys.exit(main(sys.argv[1:]))"
READ = """
from pipeline.loader import FeatureDataset
dataset = FeatureDataset(sys.argv[1], ["features"])
print(len(dataset), tuple(dataset[0]["features"].shape))
"""


def run_later(script: str, *words: object, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LATER + script, *map(str, words)],
        cwd=support.ROOT,
        env=support.environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    text = done.stdout + done.stderr
    assert done.returncode == status, text[-5000:]
    return text


def forget(out: Path) -> None:
    """Take out of a store what its program would not have known."""
    place = out / "features.zarr" / "zarr.json"
    group = json.loads(place.read_text())
    attributes = group["attributes"]
    for part in ("config", "identity"):
        attributes[part].pop("label_orientation")
        attributes[part].pop("store_image")
        attributes[part].pop("codec")
    attributes["layout"].pop("image")
    attributes["layout"].pop("codec")
    attributes["config"].pop("recheck_share")
    place.write_text(json.dumps(group))
    for receipt in support.receipts(out):
        content = json.loads(receipt.read_bytes())
        for sample in content["samples"]:
            sample.pop("explained_variance")
        receipt.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards, and a store of which one of two shards is done; and the same, whole."""
    folder = tmp_path_factory.mktemp("versions")
    for tar in range(2):
        members = [m for n in range(4) for m in good_sample(f"k{tar}{n}", 10 * tar + n)]
        write_tar(folder / f"v-{tar}.tar", members)
    options = (*support.TINY, "--labels", "seg", "--rows-per-shard", 2, "--store-image", "false", "--codec", "zstd")
    run("precompute", "--shards", folder / "v-0.tar", "--out", folder / "out", *options)
    run("precompute", "--shards", folder / "v-*.tar", "--out", folder / "whole", *options)
    forget(folder / "out")
    return folder, folder / "out"


def test_a_later_program_opens_verifies_and_finishes_a_store_of_this_format(half: tuple[Path, Path]) -> None:
    folder, out = half
    assert "4 (64, 64, 64)" in run_later(READ, out)
    assert "clean: 2 units, 4 samples = 4 ok + 0 failed" in run_later(COMMAND, "verify", out)
    options = (*support.TINY, "--labels", "seg", "--rows-per-shard", 2)
    text = run_later(COMMAND, "precompute", "--shards", folder / "v-*.tar", "--out", out, *options)
    assert "2 units done before, 2 to do" in text
    assert "was made before there was the option store_image, and goes on as it is: store_image=False" in text
    assert "was made before there was the option codec, and goes on as it is: codec=zstd" in text
    assert array_files(out) == array_files(folder / "whole")
    # Once it was finished by the later program, this one refuses it in one line.
    text = support.run("verify", out, status=1)
    (line,) = [line for line in text.splitlines() if line.startswith("verify: ")]
    assert "StoreFormatError" in line

"""An evaluation in this process: it starts without Ray, and fits probes on no more vectors than it may."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.evaluate import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.options import Size
from tests.e2e import support

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = [member for number in range(4) for member in support.good_sample(f"s{number}", number)]
    return support.write_tar(tmp_path_factory.mktemp("shards") / "images.tar", members)


def options(shards: Path, out: Path, **more: Any) -> EvaluateConfig:
    values: dict[str, Any] = {"backbone": "test_vit", "pretrained": False, "stride": 16, "size": Size(32, 32)}
    values |= {"classes": 8, "rows": ("nearest", "bilinear"), "pictures": 1, "threads": 1, "resamples": 20}
    return EvaluateConfig(train=(str(shards),), val=(str(shards),), out=str(out), **(values | more))


@pytest.mark.parametrize(("most", "cells", "pixels"), [(3, 3, 3), (50, 16, 50), (10_000, 16, 400)])
def test_a_probe_is_fitted_on_no_more_vectors_than_it_may(
    shards: Path, tmp_path: Path, most: int, cells: int, pixels: int
) -> None:
    """Four images of four cells; of fewer vectors than images, every image gave one all the same."""
    results = evaluate(options(shards, tmp_path, max_vectors=most, seeds=2))
    assert f"on {cells} feature vectors" in results["probes"]["seg"]
    vectors = results["methods"]["bilinear"]["seg"]["retrained"]["vectors"]
    assert vectors == [pixels, pixels]


def test_results_are_written_as_they_are_returned(shards: Path, tmp_path: Path) -> None:
    results = evaluate(options(shards, tmp_path, retrained=False, views=2, views_images=1, cam_shards=(str(shards),)))
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["methods"]) == ["nearest", "bilinear"]
    for parts in results["methods"].values():
        assert list(parts) == ["seg", "seg views", "CAM"]
    assert results["methods"]["nearest"]["seg views"]["measures"].keys() == {"explained variance"}
    assert results["methods"]["bilinear"]["seg"]["drop-in"]["difference"] == {}
    assert {path.name[:9] for path in (tmp_path / "pictures").iterdir()} == {"seg_00000", "cam_00000"}


def test_pictures_of_an_earlier_evaluation_are_replaced(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("seg_00099_old.png", "mine.png"):
        (folder / name).write_bytes(b"")
    evaluate(options(shards, tmp_path, retrained=False))
    assert sorted(path.name for path in folder.iterdir()) == ["mine.png", "seg_00000_s0.png"]


def test_evaluate_starts_without_ray(shards: Path, tmp_path: Path) -> None:
    """The job as a whole, from its arguments to the table."""
    arguments = ["--train", shards, "--val", shards, "--out", tmp_path, "--classes", 8, "--backbone", "test_vit"]
    arguments += ["--pretrained", "false", "--stride", 16, "--size", 32, "--rows", "bilinear", "--threads", 1]
    code = (
        "import sys; from jobs.evaluate import main\n"
        f"assert main({[str(argument) for argument in arguments]!r}) == 0\n"
        "assert 'ray' not in sys.modules, 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "table.md").exists()

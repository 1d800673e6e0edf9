"""The table as a user makes it: real images with labels in shards, every kind of row, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featup.backbones import create_backbone
from featup.checkpoints import upsampler_bytes
from featup.metrics import class_counts, mean_iou
from featup.probes import cell_shares, fit_segmentation
from featup.upsamplers import Interpolate, create_trainable
from tests.e2e import support

# 0 to 7: what the red channel is, in eighths.
CLASSES = 8
ROWS = ("nearest", "bilinear", "bilateral", "strided", "large_image", "implicit")
OPTIONS = ("--backbone", "test_vit", "--pretrained", "false", "--stride", 16, "--size", "64x64", "--norm", "layer")
OPTIONS = (*OPTIONS, "--classes", CLASSES, "--threads", 1)
FIT = ("--fit-steps", 15, "--fit-views", 4, "--fit-components", 8, "--views", 2, "--views-images", 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name, first, count in (("train", 0, 12), ("val", 100, 5)):
        samples = [support.good_sample(f"img{first + n}", first + n) for n in range(count)]
        for number, sample in enumerate(samples):
            metres = 1 + support.photograph(first + number)[..., 1].astype(np.uint16) * 8
            sample.append((f"img{first + number}.depth.png", support.encode(metres, "PNG")))
        support.write_tar(folder / f"{name}.tar", [member for sample in samples for member in sample])
    return folder


@pytest.fixture(scope="module")
def evaluated(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated")
    backbone = create_backbone("test_vit", stride=16, image_size=(64, 64))
    torch.manual_seed(0)
    names = {"name": backbone.name, "layer": backbone.layer, "digest": backbone.digest}
    checkpoint = folder / "jbu.safetensors"
    checkpoint.write_bytes(upsampler_bytes(create_trainable("jbu", backbone.channels), backbone=names))
    support.run(
        "evaluate", "--train", shards / "train.tar", "--val", shards / "val.tar", "--out", folder / "out", *OPTIONS,
        *FIT, "--depth-train", shards / "train.tar", "--depth-val", shards / "val.tar", "--cam-shards",
        shards / "val.tar", "--limit", 4, "--pictures", 2, "--rows", *ROWS, f"jbu={checkpoint}",
    )  # fmt: skip
    return folder / "out", json.loads((folder / "out" / "table.json").read_text())


def test_every_row_has_every_number(evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, found = evaluated
    assert list(found["rows"]) == [*ROWS, "jbu"]
    assert {name: one["images"] for name, one in found["data"].items()} == {
        "seg train": 12, "seg val": 4, "seg views": 2, "depth train": 12, "depth val": 4, "depth views": 2, "CAM": 4
    }  # fmt: skip
    for name, row in found["rows"].items():
        assert 0 < row["seg"]["drop-in"]["measures"]["mIoU"] < 100
        assert 0 < row["depth"]["drop-in"]["measures"]["RMSE"] < 2
        assert ("retrained" in row["seg"]) == (name != "implicit")
        assert row["seg views"]["measures"]["explained"] < 100
        assert 0 <= row["CAM"]["measures"]["AD"] <= 100
    text = (out / "table.md").read_text()
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + len(found["rows"])


def test_a_fit_explains_the_most_of_views_held_out(evaluated: tuple[Path, dict[str, Any]]) -> None:
    explained = {name: row["seg views"]["measures"]["explained"] for name, row in evaluated[1]["rows"].items()}
    assert explained["implicit"] > explained["bilateral"]


def test_the_numbers_of_bilinear_are_those_computed_by_hand(
    evaluated: tuple[Path, dict[str, Any]], shards: Path
) -> None:
    from pipeline.decode import DecodeOptions, prepare_sample
    from pipeline.read import iterate_tar

    def load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        options = DecodeOptions(size=(64, 64), geometry="squash", labels=("seg",))
        samples = [prepare_sample(one, options) for _, one in iterate_tar(str(shards / f"{name}.tar"))]
        images = torch.from_numpy(np.stack([one.image for one in samples]))
        return images, torch.from_numpy(np.stack([one.labels["seg"] for one in samples])).int()

    backbone = create_backbone("test_vit", stride=16, image_size=(64, 64), norm="layer")
    images, labels = load("train")
    with torch.inference_mode():
        features = torch.cat([backbone(one) for one in images.split(8)])
    groups = torch.arange(len(images)).repeat_interleave(16)
    shares = cell_shares(labels, (4, 4), CLASSES)
    probe = fit_segmentation(features.clone().flatten(0, 2), shares.flatten(0, 2), groups)
    images, labels = load("val")
    with torch.inference_mode():
        maps = Interpolate("bilinear")(backbone(images[:4]), images[:4], (64, 64), probe.channel_map)
    wanted = mean_iou(class_counts(maps.argmax(-1), labels[:4], CLASSES))
    found = evaluated[1]["rows"]["bilinear"]["seg"]["drop-in"]["measures"]["mIoU"]
    assert found == pytest.approx(wanted, abs=0.3)


def test_pictures_have_a_panel_for_every_row(evaluated: tuple[Path, dict[str, Any]]) -> None:
    pictures = sorted((evaluated[0] / "pictures").glob("*.png"))
    assert [path.name.split("_")[0] for path in pictures] == ["cam"] * 2 + ["depth"] * 2 + ["seg"] * 2
    for path in pictures:
        with Image.open(path) as picture:
            # Image, label (but for CAM) and seven rows, each 336 pixels high and square.
            assert picture.width > 336 * (8 if path.name.startswith("cam") else 9)


def test_rows_that_cannot_be_made_are_refused(shards: Path, tmp_path: Path) -> None:
    command = ("--train", shards / "train.tar", "--val", shards / "val.tar", "--out", tmp_path / "out", *OPTIONS)
    text = support.run("evaluate", *command, "--rows", "bilinear", "guided", status=1)
    assert "'guided' is not one of nearest, bilinear" in text
    other = tmp_path / "other.safetensors"
    names = {"name": "resnet50", "layer": 3, "digest": "0" * 64}
    other.write_bytes(upsampler_bytes(create_trainable("jbu", 64), backbone=names))
    text = support.run("evaluate", *command, "--rows", f"jbu={other}", status=1)
    assert "was trained for resnet50, layer 3" in text

"""The table as a user makes it: labelled images in shards, every kind of method, and refusals; a store's probe."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featup.backbones import create_backbone
from featup.checkpoints import load_probe, upsampler_bytes
from featup.evaluation.metrics import class_counts, mean_iou, pixel_accuracy
from featup.evaluation.probes import cell_shares, fit_segmentation
from featup.upsamplers import Interpolate, create_trainable
from jobs import predict, train_probe
from jobs.evaluate import main
from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import prepare_sample
from pipeline.loader.dataset import FeatureDataset
from tests.e2e import support
from tests.e2e.in_process import run
from tests.pipeline.inputs.tars import iterate_tar

# 0 to 7: what the red channel is, in eighths.
CLASSES = 8
ROWS = ("nearest", "bilinear", "bilateral", "strided", "large_image", "deep_image_prior", "implicit", "multiview:16")
BACKBONE = ("--backbone", "test_vit", "--pretrained", "false", "--stride", 16, "--size", "64x64", "--norm", "layer")
OPTIONS = (*BACKBONE, "--classes", CLASSES, "--threads", 1)
FIT = ("--fit-steps", 15, "--fit-views", 12, "--fit-components", 8, "--prior-steps", 10)
VIEWS = ("--views", 2, "--views-images", 2)
# The four of five that a limit of 4 takes.
LIMITED = [0, 1, 3, 4]


def words(*values: object) -> list[str]:
    return [str(one) for one in values]


def load(shards: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and class maps of a shard, without the evaluation."""
    options = DecodeOptions(size=(64, 64), geometry="squash", labels=("seg",))
    samples = [prepare_sample(one, options) for _, one in iterate_tar(str(shards / f"{name}.tar"))]
    images = torch.from_numpy(np.stack([one.image for one in samples]))
    return images, torch.from_numpy(np.stack([one.labels["seg"] for one in samples])).int()


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
    run(
        "evaluate", "--train", shards / "train.tar", "--val", shards / "val.tar", "--out", folder / "out", *OPTIONS,
        *FIT, *VIEWS, "--depth-train", shards / "train.tar", "--depth-val", shards / "val.tar", "--cam-shards",
        shards / "val.tar", "--limit", 4, "--pictures", 2, "--rows", *ROWS, f"jbu={checkpoint}",
    )  # fmt: skip
    return folder / "out", json.loads((folder / "out" / "table.json").read_text())


def test_every_method_has_every_number(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, found = evaluated
    assert list(found["methods"]) == [*ROWS, "jbu"]
    assert {name: one["images"] for name, one in found["data"].items()} == {
        "seg train": 12, "seg val": 4, "seg views": 2, "depth train": 12, "depth val": 4, "depth views": 2, "CAM": 4
    }  # fmt: skip
    for name, parts in found["methods"].items():
        assert 0 < parts["seg"]["drop-in"]["measures"]["mIoU"] < 100
        assert 0 < parts["depth"]["drop-in"]["measures"]["RMSE"] < 2
        assert ("retrained" in parts["seg"]) == (name not in ("deep_image_prior", "implicit"))
        assert parts["seg views"]["measures"]["explained variance"] < 100
        assert 0 <= parts["CAM"]["measures"]["AD"] <= 100


def test_the_table_shows_these_numbers(evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, found = evaluated
    lines = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "columns do not line up"
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert [row[0] for row in rows] == list(found["methods"])
    shown = {row[0]: dict(zip(names, row, strict=True)) for row in rows}
    for name, one in found["methods"].items():
        assert shown[name]["depth drop-in RMSE m ↓"].startswith(f"{one['depth']['drop-in']['measures']['RMSE']:.3f}")
        assert shown[name]["seg ms/image"] == f"{1000 * one['seg']['seconds_per_image']:.0f}"
    ours, baseline = (found["methods"][name]["seg"]["retrained"] for name in ("nearest", "bilinear"))
    interval = ours["difference"]["mIoU"]
    assert interval["low"] < interval["mean"] < interval["high"]
    assert interval["observed"] == pytest.approx(ours["measures"]["mIoU"] - baseline["measures"]["mIoU"])
    cell = f"{ours['measures']['mIoU']:.1f} ({interval['observed']:+.1f} [{interval['low']:+.1f}, "
    assert shown["nearest"]["seg retrained mIoU % ↑"] == f"{cell}{interval['high']:+.1f}])"
    assert shown["bilinear"]["seg retrained mIoU % ↑"] == f"{baseline['measures']['mIoU']:.1f}"
    assert shown["implicit"]["seg retrained mIoU % ↑"] == ""


def test_an_average_of_views_explains_more_of_held_out_views_than_its_base(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    methods = evaluated[1]["methods"]
    scores = {name: parts["seg views"]["measures"]["explained variance"] for name, parts in methods.items()}
    assert scores["multiview:16"] > scores["bilateral"]


def test_drop_in_numbers_are_those_computed_by_hand(evaluated: tuple[Path, dict[str, Any]], shards: Path) -> None:
    """For the nearest cell, the predictions of the coarse map itself."""
    backbone = create_backbone("test_vit", stride=16, image_size=(64, 64), norm="layer")
    images, labels = load(shards, "train")
    with torch.inference_mode():
        features = torch.cat([backbone(one) for one in images.split(8)])
    groups = torch.arange(len(images)).repeat_interleave(16)
    shares = cell_shares(labels, (4, 4), CLASSES)
    probe = fit_segmentation(features.clone().flatten(0, 2), shares.flatten(0, 2), groups).channel_map
    images, labels = (one[LIMITED] for one in load(shards, "val"))
    with torch.inference_mode():
        coarse = backbone(images)
        cells = (coarse @ probe.weight.T + probe.bias).argmax(-1)
        smooth = Interpolate("bilinear")(coarse, images, (64, 64), probe).argmax(-1)
    predictions = {"nearest": cells.repeat_interleave(16, 1).repeat_interleave(16, 2), "bilinear": smooth}
    for name, prediction in predictions.items():
        counts = class_counts(prediction, labels, CLASSES)
        measures = evaluated[1]["methods"][name]["seg"]["drop-in"]["measures"]
        # Pixels on the line between two classes may change sides by how a batch is summed up.
        assert measures["mIoU"] == pytest.approx(mean_iou(counts), abs=0.3), name
        assert measures["accuracy"] == pytest.approx(pixel_accuracy(counts), abs=0.3), name


def test_probes_have_learned_something(evaluated: tuple[Path, dict[str, Any]], shards: Path) -> None:
    labels = load(shards, "val")[1][LIMITED]
    chance = 100 * labels.flatten().bincount().max().item() / labels.numel()
    for setting in ("drop-in", "retrained"):
        assert evaluated[1]["methods"]["bilinear"]["seg"][setting]["measures"]["accuracy"] > chance + 10, setting


def test_pictures_have_a_panel_for_every_method(evaluated: tuple[Path, dict[str, Any]]) -> None:
    pictures = sorted((evaluated[0] / "pictures").glob("*.png"))
    assert [path.name.split("_")[0] for path in pictures] == ["cam"] * 2 + ["depth"] * 2 + ["seg"] * 2
    for path in pictures:
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
        # Image, label (but for CAM) and nine methods, each 336 pixels high and square, in lines with titles.
        lines, rest = divmod(pixels.shape[0], 336 + 36)
        assert rest == 0
        panels = [
            pixels[372 * line + 28 : 372 * line + 364, 8 + 344 * place :][:, :336]
            for line in range(lines)
            for place in range((pixels.shape[1] - 8) // 344)
        ]
        filled = [one for one in panels if (one != 255).any()]
        assert len(filled) == (10 if path.name.startswith("cam") else 11), path.name
        assert all(one.std() > 5 for one in filled), path.name


@pytest.mark.parametrize("rows", [("bilinear", "guided"), ("bilinear", "jbu"), ("bilinear=file", "nearest")], ids=str)
def test_methods_that_do_not_exist_are_refused(
    shards: Path, tmp_path: Path, rows: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*words("--train", shards / "train.tar", "--val", shards / "val.tar", "--out", tmp_path / "out"),
              *words(*OPTIONS, "--rows", *rows)])  # fmt: skip
    wrong = next(row for row in rows if row not in ROWS)
    assert f"rows: {wrong!r} is not one of nearest, bilinear" in capsys.readouterr().err


def test_a_checkpoint_of_another_backbone_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    names = {"name": "resnet50", "layer": 3, "digest": "0" * 64}
    other.write_bytes(upsampler_bytes(create_trainable("jbu", 64), backbone=names))
    status = main([*words("--train", shards / "train.tar", "--val", shards / "val.tar", "--out", tmp_path / "out"),
                   *words(*OPTIONS, "--rows", f"jbu={other}")])  # fmt: skip
    assert status == 1
    assert "was made for resnet50, layer 3" in capsys.readouterr().err


@pytest.fixture(scope="module")
def fitted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A store, a probe of it, and what was printed of the probe."""
    folder = tmp_path_factory.mktemp("fitted")
    store, file = folder / "store", folder / "probe.safetensors"
    run("precompute", "--shards", shards / "train.tar", "--out", store, "--labels", "seg", "--upsampler",
                "bilinear", "--object-store-mb", 100, *BACKBONE)  # fmt: skip
    return store, file, run("train_probe", "--store", store, "--val-store", store, "--out", file, "--classes", CLASSES,
                            "--workers", 0)  # fmt: skip


@pytest.mark.ray
def test_a_probe_of_a_store_that_precompute_made(
    fitted: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, file, text = fitted
    printed = text.splitlines()[-1]
    probe = load_probe(file)
    assert (probe.kind, probe.vectors) == ("seg", 12 * 200)
    samples = [FeatureDataset(str(store), ["features", "seg"])[number] for number in range(12)]
    labels = torch.stack([one["seg"] for one in samples])
    maps = [one["features"] @ probe.channel_map.weight.T + probe.channel_map.bias for one in samples]
    counts = class_counts(torch.stack(maps).argmax(-1), labels, CLASSES)
    chance = 100 * labels.flatten().bincount().max().item() / labels.numel()
    assert pixel_accuracy(counts) > chance + 10
    found = dict(text.rsplit(" ", 1) for text in printed.split(": ", 1)[1].split("  "))
    assert float(found["mIoU"]) == pytest.approx(mean_iou(counts), abs=0.05)
    assert float(found["accuracy"]) == pytest.approx(pixel_accuracy(counts), abs=0.05)
    missing = words("--store", store, "--out", tmp_path / "depth.safetensors", "--label", "depth", "--workers", 0)
    assert train_probe.main(missing) == 1
    assert "depth" in capsys.readouterr().err


@pytest.mark.ray
def test_photographs_predicted_by_that_probe(
    fitted: tuple[Path, Path, str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, probe, _ = fitted
    folder, out = tmp_path / "photographs", tmp_path / "out"
    folder.mkdir()
    numbers = [100 + number for number in LIMITED]
    for number in numbers:
        (folder / f"{number}.jpg").write_bytes(support.encode(support.photograph(number)))
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    words_of_files = words("--probe", probe, "--images", folder, "--out", out, "--threads", 1)
    assert predict.main(words_of_files) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "input 5 = ok 4 + failed 1"
    assert "JobFailedError: 1 of 5 images failed (20.00%), more than max_failed_fraction=1.00%" in printed.err
    assert predict.main([*words_of_files, "--max-failed-fraction", "0.2"]) == 0
    right = []
    for number in numbers:
        with Image.open(out / "seg" / f"{number}.png") as picture:
            right.append(np.asarray(picture) == support.photograph(number)[..., 0] // 32)
    run("predict", "--probe", probe, "--shards", shards / "val.tar", "--limit", 4, "--out", tmp_path / "of_shards")
    found = json.loads((tmp_path / "of_shards" / "predictions.json").read_text())
    assert found["measures"]["accuracy"] == pytest.approx(100 * np.mean(right))
    assert np.mean(right) > 0.25, "twice of what chance gives"
    assert (out / "contact_sheet.png").exists()
    assert predict.main(words("--probe", probe, "--images", tmp_path / "nowhere", "--out", out)) == 1
    assert "images: there is no file or folder at " in capsys.readouterr().err

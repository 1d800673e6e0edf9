from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from featup.checkpoints import load_probe
from pipeline.config.base import describe
from pipeline.config.precompute import PrecomputeConfig
from pipeline.config.probe import ProbeConfig
from pipeline.errors import ConfigError
from pipeline.inputs.plan import UnitKey
from pipeline.options import Size
from pipeline.store.create import create_store
from pipeline.store.layout import OK, Layout
from pipeline.store.writer import StoreWriter
from pipeline.training.probes import train_probe
from pipeline.training.tasks import DepthTask, PixelDraw, SegmentationTask, Task, draw_rows

NAN = float("nan")
SIZE = (6, 10)
TRUTH = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
DEPTH = torch.tensor([0.5, -0.25, 0.0, 1.0, 0.125])


def make_store(
    url: str, images: int, seed: int, digests: dict[str, str] | None = None, norm: Literal["model", "layer"] = "model"
) -> str:
    """A store whose labels are linear in its features, but for pixels without a label, where features mislead."""
    layout = Layout(
        rows=images,
        rows_per_shard=images,
        height=SIZE[0],
        width=SIZE[1],
        channels=5,
        tile=SIZE,
        labels=("seg", "depth"),
        seg_dtype="uint8",
        valid_mask=False,
        compression_level=1,
    )
    config = PrecomputeConfig(shards=("a.tar",), out=url, size=Size(*SIZE), labels=("seg", "depth"), norm=norm)
    setup: dict[str, Any] = {"layer": 11, "channels": 5, "mean": [0.5] * 3, "std": [0.5] * 3}
    setup["digests"] = {"backbone": "weights", **(digests or {})}
    create_store(url, layout, {"config": describe(config), "setup": setup, "identity": {}})
    features = torch.randn(images, *SIZE, 5, generator=torch.Generator().manual_seed(seed)).half()
    seg = (features.float() @ TRUTH.T).argmax(-1).to(torch.uint8).numpy()
    depth = (features.float() @ DEPTH + 6).numpy()
    stored = features.numpy().copy()
    seg[:, :2], depth[:, :2], stored[:, :2] = 255, np.nan, 50 * stored[:, :2]
    blocks = {"features": stored, "seg": seg, "depth": depth, "status": np.full(images, OK, np.uint8)}
    StoreWriter(url, layout).write(UnitKey(unit=0, shard=0, start=0, stop=images, row=0), blocks)
    return url


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("probes")
    return make_store(str(folder / "train"), 12, 1), make_store(str(folder / "val"), 4, 2)


def config_of(stores: tuple[str, str], out: Path, **options: object) -> ProbeConfig:
    values = {"label": "seg", "classes": 3, "pixels": 30, "workers": 0, "threads": 1} | options
    return ProbeConfig(store=stores[0], val_store=stores[1], out=str(out), **values)  # type: ignore[arg-type]


def test_a_segmentation_probe_of_a_store(
    stores: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seg.safetensors"
    probe = train_probe(config_of(stores, out))
    printed = capsys.readouterr().out
    numbers = dict(
        zip(
            ("mIoU", "accuracy"),
            (float(text.split()[1]) for text in printed.splitlines()[-1].split(": ")[1].split("  ")),
            strict=True,
        )
    )
    assert numbers["accuracy"] > 97
    assert numbers["mIoU"] > 94
    assert probe.vectors == 12 * 30
    found = load_probe(out)
    assert torch.equal(found.channel_map.weight, probe.channel_map.weight)
    assert f"weight decay {probe.weight_decay:g}" in printed


def test_a_depth_probe_of_a_store(stores: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = train_probe(config_of(stores, tmp_path / "depth.safetensors", label="depth", classes=None))
    assert torch.allclose(probe.channel_map.weight[0], DEPTH, atol=1e-3)
    assert probe.channel_map.bias.item() == pytest.approx(6, abs=1e-2)
    assert "delta 1.25 100" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_file_whatever_reads_it(stores: tuple[str, str], tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "workers", "other")]
    options: list[dict[str, object]] = [{}, {"workers": 2, "batch_size": 3}, {"seed": 1}]
    one, workers, other = (
        train_probe(config_of(stores, file, **values)).channel_map.weight
        for file, values in zip(files, options, strict=True)
    )
    assert torch.equal(one, workers)
    assert not torch.equal(one, other)


def test_a_limit_on_all_pixels_holds(stores: tuple[str, str], tmp_path: Path) -> None:
    probe = train_probe(config_of(stores, tmp_path / "few.safetensors", max_vectors=100))
    assert probe.vectors == 100 // 12 * 12


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            {"digests": {"backbone": "others"}},
            r"backbone digest: \S*train has 'weights', \S*other has 'others'\. Make both",
        ),
        (
            {"digests": {"pca": "b"}},
            r"pca digest: \S*train has None, \S*other has 'b'\. .* the second with --pca-from .*train",
        ),
        ({"norm": "layer"}, r"norm: \S*train has 'model', \S*other has 'layer'\. Make both"),
    ],
)
def test_a_store_of_other_features_is_refused(
    stores: tuple[str, str], tmp_path: Path, made: dict[str, Any], text: str
) -> None:
    other = make_store(str(tmp_path / "other"), 2, 3, **made)
    with pytest.raises(ConfigError, match=f"do not hold the same features: {text}"):
        train_probe(config_of((stores[0], other), tmp_path / "probe.safetensors"))


def test_a_store_upsampled_by_another_way_is_taken(stores: tuple[str, str], tmp_path: Path) -> None:
    other = make_store(str(tmp_path / "other"), 4, 2, digests={"checkpoint": "jbu"})
    train_probe(config_of((stores[0], other), tmp_path / "probe.safetensors"))


def test_more_classes_than_were_told_are_refused(stores: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class id 2 with classes=2"):
        train_probe(config_of(stores, tmp_path / "probe.safetensors", classes=2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": None}, "seg needs the number of classes"),
        ({"label": "depth"}, "depth has none"),
        ({"pixels": 0}, "pixels=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be between 0 and 4294967295"),
    ],
    ids=["no_classes", "classes_of_depth", "no_pixels", "seed"],
)
def test_options_that_make_no_sense_are_refused(
    stores: tuple[str, str], tmp_path: Path, options: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        config_of(stores, tmp_path / "probe.safetensors", **options)


def test_the_ignored_class_becomes_no_class_also_below_the_number_of_classes() -> None:
    task = SegmentationTask(classes=3, ignore_index=1)
    prepared = task.prepare(torch.tensor([0, 1, 2, 255], dtype=torch.uint8))
    assert prepared.tolist() == [0, -1, 2, -1]
    assert torch.equal(task.prepare(prepared), prepared)
    assert task.points(prepared).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    with pytest.raises(ConfigError, match="class id 3 with classes=3 and ignore_index=1"):
        task.prepare(torch.tensor([3]))


@pytest.mark.parametrize("task", [SegmentationTask(4), DepthTask()], ids=lambda task: task.kind)
def test_drawn_pixels_are_labelled_ones_while_there_are_any(task: Task) -> None:
    labels = torch.full((6, 7), 255.0 if task.kind == "seg" else NAN)
    labels[2, 1:6] = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0])
    features = torch.arange(42.0).view(6, 7, 1)
    sample: dict[str, Tensor] = {"features": features, task.kind: labels, "row": torch.tensor(4)}
    drawn = PixelDraw(task, 3, seed=0)(sample)
    known = {15 + n: value for n, value in enumerate((1, 2, 3, 1, 2))}
    assert len(set(drawn["features"][:, 0].tolist())) == 3
    assert all(known[int(at)] == int(label) for at, label in zip(drawn["features"], drawn[task.kind], strict=True))
    more = PixelDraw(task, 9, seed=0)(sample)
    assert (int(task.known(more[task.kind]).sum()), len(more["features"])) == (5, 9)
    again, other = PixelDraw(task, 3, seed=0)(sample), PixelDraw(task, 3, seed=5)(sample)
    assert torch.equal(drawn["features"], again["features"])
    assert not torch.equal(drawn["features"], other["features"])


def test_rows_are_drawn_by_a_seed_and_in_order() -> None:
    assert draw_rows(5, 7, 0).tolist() == [0, 1, 2, 3, 4]
    drawn = draw_rows(100, 10, 0)
    assert len(drawn.unique()) == 10
    assert torch.equal(drawn, draw_rows(100, 10, 0).sort().values)
    assert not torch.equal(drawn, draw_rows(100, 10, 1))

"""Linear probes over feature stores: fitted, saved, evaluated; and stores that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from featup.checkpoints import load_probe
from pipeline.config.probe import ProbeConfig
from pipeline.errors import ConfigError, IncompleteStoreError
from pipeline.store.create import withdraw_complete
from pipeline.training.probes import train_probe
from pipeline.training.tasks import SegmentationTask, sample_indices
from tests.pipeline.training.support import DEPTH, linear_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("probes")
    return linear_store(str(folder / "train"), 12, 1), linear_store(str(folder / "val"), 4, 2)


def config_of(stores: tuple[str, str], out: Path, **options: object) -> ProbeConfig:
    values = {"label": "seg", "classes": 3, "pixels": 30, "workers": 0, "threads": 1, "val_store": stores[1]} | options
    return ProbeConfig(store=stores[0], out=str(out), **values)  # type: ignore[arg-type]


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
    options: list[dict[str, object]] = [{}, {"workers": 2, "batch_size": 3, "val_store": None}, {"seed": 1}]
    one, workers, other = (
        train_probe(config_of(stores, file, **values)).channel_map.weight
        for file, values in zip(files, options, strict=True)
    )
    assert torch.equal(one, workers)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("most", [5, 12, 17, 100, 12 * 30, 10_000])
def test_as_many_vectors_as_the_limit_allows(stores: tuple[str, str], tmp_path: Path, most: int) -> None:
    """12 images of 30 pixels each; of fewer vectors than images, every image had one all the same."""
    probe = train_probe(config_of(stores, tmp_path / "few.safetensors", label="depth", classes=None, max_vectors=most))
    assert probe.vectors == min(most, 12 * 30)


@pytest.mark.parametrize(
    ("differing", "text"),
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
    stores: tuple[str, str], tmp_path: Path, differing: dict[str, Any], text: str
) -> None:
    other = linear_store(str(tmp_path / "other"), 2, 3, **differing)
    with pytest.raises(ConfigError, match=f"do not hold the same features: {text}"):
        train_probe(config_of((stores[0], other), tmp_path / "probe.safetensors"))


def test_a_store_upsampled_by_another_way_is_served(stores: tuple[str, str], tmp_path: Path) -> None:
    other = linear_store(str(tmp_path / "other"), 4, 2, digests={"checkpoint": "jbu"})
    train_probe(config_of((stores[0], other), tmp_path / "probe.safetensors"))


@pytest.mark.parametrize("workers", [0, 1])
def test_class_ids_beyond_the_number_of_classes_are_refused(
    stores: tuple[str, str], tmp_path: Path, workers: int
) -> None:
    """In one line, also where another process reads: PyTorch put a traceback of that process in front."""
    with pytest.raises(ConfigError, match=r"^class id 2 with classes=2") as caught:
        train_probe(config_of(stores, tmp_path / "probe.safetensors", classes=2, workers=workers))
    assert "\n" not in str(caught.value)


def test_a_store_whose_job_has_not_ended_is_refused(stores: tuple[str, str], tmp_path: Path) -> None:
    store = linear_store(str(tmp_path / "store"), 4, 1)
    withdraw_complete(store)
    for pair in ((store, stores[1]), (stores[0], store)):
        with pytest.raises(IncompleteStoreError, match="is not complete"):
            train_probe(config_of(pair, tmp_path / "probe.safetensors"))


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


def test_indices_are_sampled_by_a_seed_and_in_order() -> None:
    assert sample_indices(5, 7, 0).tolist() == [0, 1, 2, 3, 4]
    sampled = sample_indices(100, 10, 0)
    assert len(sampled.unique()) == 10
    assert torch.equal(sampled, sample_indices(100, 10, 0).sort().values)
    assert not torch.equal(sampled, sample_indices(100, 10, 1))

"""Crops, flips, and the batches of a DataLoader."""

import dataclasses
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from pipeline.errors import ConfigError
from pipeline.loader import FeatureDataset
from pipeline.loader.memory import BatchMemory
from pipeline.store.create import create_store
from pipeline.store.writer import StoreWriter
from tests.pipeline.loader.conftest import ALL, GOOD, STATUS
from tests.pipeline.store.support import finish_store
from tests.pipeline.store.test_layout import IDENTITY, KEYS, LAYOUT, Blocks, unit_blocks


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"crop": (7, 2)}, "crop (height, width) = (7, 2) is not inside the features' 6x10 (height x width)"),
        ({"crop": (2, 0)}, "crop (height, width) = (2, 0) is not inside"),
        ({"crop": (2, 2), "window": (0, 0, 2, 2)}, "window=(0, 0, 2, 2) is one place and crop=(2, 2) another one each"),
        ({"crop": 100}, "crop=100 must be two numbers, (height, width), such as (112, 112)"),
        ({"flip": 1.5}, "flip=1.5 is a probability, from 0 to 1"),
    ],
)
def test_crops_and_flips_that_cannot_be_are_refused(
    store: tuple[str, Blocks], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        FeatureDataset(store[0], **options)


def cut(whole: Tensor, window: Sequence[int], mirrored: bool) -> Tensor:
    top, left, height, width = window
    part = whole[top : top + height, left : left + width]
    return part.flip(1) if mirrored else part


def test_crops_and_flips_treat_all_arrays_alike(store: tuple[str, Blocks]) -> None:
    whole = FeatureDataset(store[0], ALL)
    crops = FeatureDataset(store[0], ALL, crop=(3, 4), flip=0.5)
    torch.manual_seed(1)
    places, flips = set(), 0
    for index in range(len(GOOD)):
        wanted = whole[index]
        for _ in range(100):
            found = crops[index]
            window, mirrored = found["window"].tolist(), bool(found["mirrored"])
            assert window[2:] == [3, 4]
            for name in ("features", "image", "seg", "depth", "valid"):
                part = cut(wanted[name], window, mirrored)
                assert torch.equal(found[name].nan_to_num(-1.0), part.nan_to_num(-1.0)), name
            assert (found["cls"], found["row"], found["key"]) == (wanted["cls"], wanted["row"], wanted["key"])
            places.add(tuple(window[:2]))
            flips += mirrored
    assert places == {(top, left) for top in range(4) for left in range(7)}, "every place"
    assert 200 < flips < 300
    assert "window" not in whole[0]


def test_torchs_seed_decides_crops_and_flips(store: tuple[str, Blocks]) -> None:
    crops = FeatureDataset(store[0], ["image"], crop=(2, 3), flip=0.5)

    def batch(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return next(iter(DataLoader(crops, 5)))

    first, again, other = batch(3), batch(3), batch(4)
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["window"], other["window"])


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_whole_samples_are_mirrored_as_well(store: tuple[str, Blocks], flip: float) -> None:
    whole, found = FeatureDataset(store[0], ALL), FeatureDataset(store[0], ALL, flip=flip)
    if not flip:
        assert "mirrored" not in found[0]
        return
    assert torch.equal(found[1]["features"], whole[1]["features"].flip(1))
    assert torch.equal(found[1]["seg"], whole[1]["seg"].flip(1))
    assert found[1]["window"].tolist() == [0, 0, 6, 10]


def scaled(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "features": 2 * sample["features"]}


class Doubled(Dataset[dict[str, Any]]):
    """A dataset of somebody else that changes the samples of a whole batch."""

    def __init__(self, url: str) -> None:
        self.samples = FeatureDataset(url)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return scaled(self.samples[index])

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        samples = self.samples.__getitems__(indices)
        for sample in samples:
            sample["features"] = 2 * sample["features"]
        return samples


def test_batches_are_what_torch_makes_of_the_samples(store: tuple[str, Blocks]) -> None:
    """They are read into one tensor, and torch's own way is taken where that is not what the samples hold any more."""
    url, _ = store
    dataset = FeatureDataset(url, ALL)
    plain = default_collate([dict(dataset[index]) for index in range(3)])
    (first, _) = DataLoader(dataset, 3)
    assert list(first) == list(plain)
    assert first["key"] == plain["key"]
    for name in (*ALL, "row"):
        assert (first[name].dtype, first[name].is_contiguous()) == (plain[name].dtype, True)
        assert torch.equal(first[name].nan_to_num(-1.0), plain[name].nan_to_num(-1.0)), name
    batch = dataset.__getitems__([0, 1, 2])
    assert default_collate(batch)["features"].data_ptr() == batch[0]["features"].data_ptr(), "nothing is copied"
    assert torch.equal(default_collate(batch[1:])["features"], plain["features"][1:]), "a part of it"
    for other in (FeatureDataset(url, transform=scaled), Doubled(url), Subset(Doubled(url), [0, 1, 2])):
        assert torch.equal(next(iter(DataLoader(other, 3)))["features"], 2 * plain["features"])
    joined = next(iter(DataLoader(ConcatDataset([dataset, dataset]), 3)))
    assert torch.equal(joined["features"], plain["features"])


LARGE = dataclasses.replace(LAYOUT, height=600, width=500, tile=(100, 100))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store whose arrays all take more than a megabyte for a batch of four."""
    url = str(tmp_path_factory.mktemp("large"))
    create_store(url, LARGE, IDENTITY)
    for number, status in enumerate(STATUS):
        StoreWriter(url, LARGE).write(KEYS[number], unit_blocks(LARGE, status, number))
    finish_store(url, STATUS)
    return url


def test_memory_is_used_again_once_nobody_holds_a_part_of_it(large: str) -> None:
    arrays = ("features", "image", "seg", "depth", "valid")
    dataset = FeatureDataset(large, arrays)
    wanted = [dict(dataset[index]) for index in range(len(GOOD))]
    memory = dataset._memory

    def check_epochs(count: int) -> None:
        for _ in range(count):
            for number, batch in enumerate(DataLoader(dataset, 4)):
                for name in arrays:
                    whole = torch.stack([sample[name] for sample in wanted[4 * number :][:4]])
                    assert torch.equal(batch[name].nan_to_num(-1.0), whole.nan_to_num(-1.0)), name

    check_epochs(2)
    made = memory.made
    check_epochs(5)
    assert memory.made == made, "all of it was there"
    held = [next(iter(DataLoader(dataset, 4)))["features"][1, 7:9] for _ in range(3)]
    for batch in DataLoader(dataset, 4):
        del batch
    for part in held:
        assert torch.equal(part, wanted[1]["features"][7:9]), "a part of a batch that is held is not written over"
    assert memory.made > made


def test_memory_of_sizes_that_are_not_asked_for_is_let_go() -> None:
    memory = BatchMemory()
    for size in range(1, 100):
        memory.take((size, 1 << 20), torch.uint8)
    assert sum(map(len, memory._free.values())) <= 12
    made = memory.made
    memory.take((99, 1 << 20), torch.uint8)
    assert memory.made == made
    for protocol in range(6):
        copy = pickle.loads(pickle.dumps(memory, protocol))
        assert copy.take((2, 3), torch.float32).shape == (2, 3)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_batches_are_read_in_any_mode_of_torch(store: tuple[str, Blocks], mode: Any) -> None:
    """Threads that read do not know of the mode, and an inference tensor is written to in that mode alone."""
    dataset = FeatureDataset(store[0])
    wanted = dataset[0]["features"]
    with mode():
        (batch, _) = DataLoader(dataset, 4)
    assert torch.equal(batch["features"][0], wanted)
    batch["features"] += 1  # as any tensor


def test_a_sample_is_a_plain_dictionary(store: tuple[str, Blocks], tmp_path: Path) -> None:
    sample = FeatureDataset(store[0])[0]
    assert type(sample) is dict
    torch.save(sample, tmp_path / "sample.pt")
    assert torch.equal(torch.load(tmp_path / "sample.pt")["features"], sample["features"])
    doubled = tree_map(lambda value: value * 2, {"features": sample["features"], "whole": sample})
    assert torch.equal(doubled["whole"]["features"], 2 * sample["features"])


def shared(samples: list[dict[str, Any]]) -> list[bool]:
    return [sample["features"].is_shared() for sample in samples]


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_only_batches_lie_in_memory_of_several_processes(store: tuple[str, Blocks]) -> None:
    """Each tensor in it takes a file descriptor: of single samples that are copied anyway there would be thousands."""
    dataset = FeatureDataset(store[0])
    for wanted, whole in (
        (True, dataset),
        (False, ConcatDataset([dataset, dataset])),
        (False, FeatureDataset(store[0], transform=scaled)),
    ):
        (found, *_) = DataLoader(whole, 4, num_workers=1, multiprocessing_context="fork", collate_fn=shared)
        assert found == [wanted] * 4

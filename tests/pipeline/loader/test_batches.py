"""Crops, flips, and the batches of a DataLoader."""

import copy
import dataclasses
import multiprocessing
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
from pipeline.loader.memory import BatchMemory, SharedMemory
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


class Counted(FeatureDataset):
    """Tells how many pieces of shared memory its worker has made."""

    made = multiprocessing.Value("i", 0)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        samples = super().__getitems__(indices)
        with self.made:
            self.made.value = self._shared_memory.made
        return samples


def loaded(dataset: Dataset[dict[str, Any]], **options: Any) -> DataLoader[dict[str, Any]]:
    """By one worker that stays."""
    options = {"batch_size": 2, "persistent_workers": True, **options}
    return DataLoader(dataset, num_workers=1, multiprocessing_context="fork", **options)


def check_batch(batch: dict[str, Any], wanted: list[dict[str, Any]]) -> None:
    for name in ("features", "image", "seg"):
        assert torch.equal(batch[name], torch.stack([wanted[index][name] for index in batch["index"]])), name


# A loop's batch, the next one by then, the two that wait and the one that is read.
IN_FLIGHT = 5


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_workers_use_memory_again_that_was_handed_back(large: str) -> None:
    arrays = ("features", "image", "seg")
    dataset = Counted(large, arrays)
    wanted = [dict(dataset[index]) for index in range(len(GOOD))]
    loader = loaded(dataset, sampler=[0, 1, 2, 3] * 10)
    for _ in range(2):
        for number, batch in enumerate(loader):
            assert type(batch) is dict
            assert list(batch) == [*arrays, "row", "key"], "nothing else, in this order"
            check_batch(batch | {"index": [2 * number % 4, 2 * number % 4 + 1]}, wanted)
            batch["features"] += 1  # whoever gets a batch may write to it
    assert 0 < Counted.made.value <= IN_FLIGHT * len(arrays)
    held = [batch["features"][1, 7:9] for batch in loader]
    for _ in loader:
        pass
    for number, part in enumerate(held):
        assert torch.equal(part, wanted[2 * number % 4 + 1]["features"][7:9]), "what is held is not written over"
    assert Counted.made.value > IN_FLIGHT * len(arrays)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_memory_that_a_fork_may_hold_is_not_used_again(large: str) -> None:
    dataset = Counted(large)
    wanted = dataset[0]["features"]
    batches = iter(loaded(dataset, sampler=[0, 1, 2, 3] * 10))
    batch = next(batches)
    # A child that has the batch, and looks at it once its parent has read all others.
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def look(features: Tensor) -> None:
        reader.recv()
        raise SystemExit(0 if torch.equal(features[0], wanted) else 1)

    child = multiprocessing.get_context("fork").Process(target=look, args=(batch["features"],))
    child.start()
    del batch
    for _ in batches:
        pass
    writer.send(0)
    child.join(60)
    assert child.exitcode == 0


def with_more(samples: list[dict[str, Any]]) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
    """A ``collate_fn`` that gives a batch twice, and a part of it besides."""
    batch = default_collate(samples)
    return batch, batch["features"][1], batch


def with_a_part_first(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A ``collate_fn`` whose part of a batch goes before it."""
    batch = default_collate(samples)
    return {"part": batch["features"][1], "batch": batch}


def with_less(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A ``collate_fn`` that changes a batch."""
    batch: dict[str, Any] = default_collate(samples)
    batch["features"] = 2 * batch["features"]
    del batch["key"]
    return batch


def remembered(samples: list[dict[str, Any]], seen: list[Any] = []) -> dict[str, Any]:  # noqa: B006
    """A ``collate_fn`` that keeps a batch and gives it once more."""
    seen.append(default_collate(samples))
    batch: dict[str, Any] = seen[0]
    return batch


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_whatever_a_collate_fn_makes_of_batches_arrives_whole(large: str) -> None:
    dataset = FeatureDataset(large)
    wanted = [dataset[index]["features"] for index in range(4)]
    parts = []
    for number, (batch, part, again) in enumerate(loaded(dataset, sampler=[0, 1, 2, 3] * 5, collate_fn=with_more)):
        both = torch.stack(wanted[2 * number % 4 :][:2])
        assert torch.equal(batch["features"], both)
        assert torch.equal(again["features"], both)
        parts.append(part)
    for number, part in enumerate(parts):
        assert torch.equal(part, wanted[2 * number % 4 + 1])
    parts = []
    for number, both in enumerate(loaded(dataset, sampler=[0, 1, 2, 3] * 5, collate_fn=with_a_part_first)):
        assert torch.equal(both["batch"]["features"], torch.stack(wanted[2 * number % 4 :][:2]))
        parts.append(both["part"])
    for number, part in enumerate(parts):
        assert torch.equal(part, wanted[2 * number % 4 + 1])
    for number, batch in enumerate(loaded(dataset, sampler=[0, 1, 2, 3] * 5, collate_fn=with_less)):
        assert torch.equal(batch["features"], 2 * torch.stack(wanted[2 * number % 4 :][:2]))
        assert "key" not in batch
    for batch in loaded(dataset, sampler=[0, 1, 2, 3] * 5, collate_fn=remembered):
        assert torch.equal(batch["features"], torch.stack(wanted[:2])), "a worker's own memory is not used again"


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_only_batches_lie_in_memory_of_several_processes(store: tuple[str, Blocks]) -> None:
    """Each tensor in it takes a file descriptor: of single samples that are copied anyway there would be thousands."""
    for made, whole in (
        (True, dataset := Counted(store[0])),
        (False, ConcatDataset([dataset, dataset])),
        (False, Counted(store[0], transform=scaled)),
    ):
        Counted.made.value = 0
        for _ in loaded(whole):
            pass
        assert (Counted.made.value > 0) is made


def test_shared_memory_of_sizes_that_are_not_asked_for_is_let_go() -> None:
    memory = SharedMemory()
    held = [memory.take((size,), torch.uint8) for size in [*range(1, 40), *[7] * 40]]
    assert sum(map(len, memory._segments.values())) <= 12 + 10
    for protocol in range(6):
        copy = pickle.loads(pickle.dumps(memory, protocol))
        assert copy.take((2, 3), torch.float32)[0].shape == (2, 3)
    made = memory.made
    del held
    memory.take((7,), torch.uint8)
    assert memory.made == made


def test_a_batch_is_copied_and_pickled_as_any_dictionary(large: str) -> None:
    dataset = FeatureDataset(large)
    batch = default_collate(dataset._read(dataset.rows[:2].tolist(), shared=True))
    for other in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), {**batch}):
        assert torch.equal(other["features"], batch["features"])

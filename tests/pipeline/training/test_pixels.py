"""The pixels a probe is fitted on: how many of which images, and what is read of a store for them."""

import itertools
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError, StoreError
from pipeline.store.create import create_store
from pipeline.store.layout import FAILED, Layout
from pipeline.training.pixels import PixelDataset, PixelSampling, tile_windows
from pipeline.training.tasks import DepthTask, SegmentationTask, Task
from tests.pipeline.store.support import finish_store
from tests.pipeline.training.support import linear_store, write_store

NAN = float("nan")


@given(st.integers(1, 60), st.integers(1, 50), st.integers(1, 4000), st.integers(0, 5))
def test_the_maximum_is_used_and_kept(images: int, pixels: int, most: int, seed: int) -> None:
    counts = PixelSampling(images, pixels, most, seed).counts()
    assert sum(counts.values()) == min(most, images * pixels)
    assert set(counts) <= set(range(images))
    assert list(counts) == sorted(counts)
    assert min(counts.values()) >= 1
    every = [*counts.values(), *([0] * (images - len(counts)))]
    assert max(every) - min(every) <= 1


def test_sampled_images_follow_from_the_seed_and_lie_anywhere() -> None:
    def images(seed: int) -> list[int]:
        return list(PixelSampling(10**8, 200, 1000, seed).counts())

    assert images(3) == images(3)
    assert images(3) != images(4)
    assert len(images(3)) == 1000
    assert (abs(np.bincount(np.array(images(3)) // 10**7, minlength=10) - 100) < 45).all()


@pytest.mark.parametrize("task", [SegmentationTask(4), DepthTask()], ids=lambda task: task.kind)
def test_sampled_pixels_are_labelled(task: Task) -> None:
    labels = torch.full((6, 7), 255.0 if task.kind == "seg" else NAN)
    labels[2, 1:6] = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0])
    known = task.known(task.prepare(labels))
    sampling = PixelSampling(9, 3, 1000, seed=0)
    chosen = sampling.choose(4, 3, known).tolist()
    assert len(set(chosen)) == 3
    assert set(chosen) < set(range(15, 20))
    assert sorted(sampling.choose(4, 9, known).tolist()) == list(range(15, 20)), "no more than have a label"
    assert sampling.choose(4, 3, known).tolist() == chosen
    others = [PixelSampling(9, 3, 1000, seed).choose(image, 3, known).tolist() for seed, image in ((5, 4), (0, 5))]
    assert chosen not in others


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 14)), max_size=30),
)
def test_windows_cover_the_tiles_of_the_pixels_once_and_no_other(
    height: int, width: int, pixels: list[tuple[int, int]]
) -> None:
    y, x = np.array(pixels, int).reshape(-1, 2).T
    covered: list[tuple[int, int]] = []
    for top, left, window_height, window_width in tile_windows(y, x, (height, width)):
        assert (top % height, left % width, window_height % height, window_width % width) == (0, 0, 0, 0)
        rows = range(top // height, (top + window_height) // height)
        columns = range(left // width, (left + window_width) // width)
        covered += itertools.product(rows, columns)
    assert sorted(covered) == sorted({(row // height, column // width) for row, column in pixels})


def test_an_image_whose_tiles_are_all_needed_is_read_at_once() -> None:
    y, x = np.mgrid[0:12, 0:15].reshape(2, -1)
    assert list(tile_windows(y, x, (4, 5))) == [(0, 0, 12, 15)]


def test_features_are_those_of_the_pixels(tmp_path: Path) -> None:
    store = linear_store(str(tmp_path), 5, 1)
    root = zarr.open_group(str(tmp_path / "features.zarr"), mode="r")
    dataset = PixelDataset(store, DepthTask(), pixels=7, max_vectors=1000, seed=2)
    assert len(dataset) == 5
    for image in range(5):
        item = dataset[image]
        known = torch.from_numpy(np.asarray(root["depth"][image])).isfinite()
        chosen = dataset.sampling.choose(image, 7, known)
        features = torch.from_numpy(np.asarray(root["features"][image])).float().flatten(0, 1)
        assert torch.equal(item["features"], features[chosen])
        assert torch.equal(item["depth"], torch.from_numpy(np.asarray(root["depth"][image])).flatten()[chosen])
        assert item["image"].tolist() == [image] * 7


def tiled_store(url: str, images: int) -> str:
    """24 x 24 pixels in nine tiles; labelled are pixels of the middle tile, and of no tile in every other image."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((images, 24, 24, 256)).astype(np.float16)
    seg = np.full((images, 24, 24), 255, np.uint8)
    seg[::2, 8:16, 8:16] = rng.integers(0, 3, (len(seg[::2]), 8, 8))
    return write_store(url, {"features": features, "seg": seg, "depth": np.full(seg.shape, np.nan, np.float32)}, (8, 8))


def test_tiles_without_sampled_pixels_are_not_read(tmp_path: Path) -> None:
    """All other tiles are damaged: reading them would fail by their checksums."""
    store = tiled_store(str(tmp_path), 6)
    wanted = [PixelDataset(store, SegmentationTask(3), 20, 1000, seed=0)[image] for image in range(6)]
    assert [len(item["features"]) for item in wanted] == [20, 0, 20, 0, 20, 0]
    (file,) = (path for path in (tmp_path / "features.zarr" / "features" / "c").rglob("*") if path.is_file())
    data = bytearray(file.read_bytes())
    # The shard's index is at its end: (offset, bytes) of each chunk, then four bytes of checksum.
    index = np.frombuffer(data[-4 - 16 * 54 : -4], np.uint64).reshape(6, 9, 2)
    for image, tile in itertools.product(range(6), range(9)):
        if tile != 4 or image % 2:
            data[int(index[image, tile, 0]) + 40] ^= 255
    file.write_bytes(data)
    items = [PixelDataset(store, SegmentationTask(3), 20, 1000, seed=0)[image] for image in range(6)]
    for item, before in zip(items, wanted, strict=True):
        assert torch.equal(item["features"], before["features"])
    data[int(index[2, 4, 0]) + 40] ^= 255
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"row 2: a chunk is not .* damaged; featup verify .* --repair") as caught:
        PixelDataset(store, SegmentationTask(3), 20, 1000, seed=0)[2]
    assert "\n" not in str(caught.value)


def test_images_that_are_not_sampled_are_not_read(tmp_path: Path) -> None:
    """One pixel of each of ten images in forty: one of nine tiles each, where whole images were read."""
    store = tiled_store(str(tmp_path), 40)
    dataset = PixelDataset(store, SegmentationTask(3), 20, max_vectors=10, seed=0)
    before = psutil.Process().io_counters().read_chars
    items = [dataset[number] for number in range(len(dataset))]
    bytes_read = psutil.Process().io_counters().read_chars - before
    assert len(items) == 10
    assert sum(len(item["features"]) for item in items) <= 10
    tile_bytes = 8 * 8 * 256 * 2
    # A tenth more for labels and the indices of shards, of which each tile needs one of 6 kB.
    assert bytes_read < 10 * (1.1 * tile_bytes + 2 * 16 * 9 * 40)


def test_a_store_without_a_good_sample_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path)
    layout = Layout(4, 4, 4, 4, 2, (4, 4), ("seg",), "uint8", False, 1)
    create_store(url, layout, {"config": {}, "setup": {}, "identity": {}})
    finish_store(url, [[FAILED] * 4])
    with pytest.raises(InputError, match="holds no sample to fit on; see its index for the reasons"):
        PixelDataset(url, SegmentationTask(3), 1, 1, 0)

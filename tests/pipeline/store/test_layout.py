import dataclasses
import json
import multiprocessing
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey
from pipeline.store.create import create_store
from pipeline.store.layout import FAILED, OK, Layout, open_arrays, stored_layout, tile_of
from pipeline.store.writer import StoreWriter, row_checksum

Blocks = dict[str, NDArray[Any]]

# Nothing square, and tiles that do not divide the image.
LAYOUT = Layout(
    rows=8,
    rows_per_shard=4,
    height=6,
    width=10,
    channels=3,
    tile=(4, 4),
    labels=("seg", "depth", "cls"),
    seg_dtype="uint8",
    valid_mask=True,
    compression_level=1,
    image=True,
)
IDENTITY = {"identity": {"backbone": "resnet50", "input digest": "abc"}}
KEYS = {0: UnitKey(0, 0, 0, 4, 0), 1: UnitKey(1, 0, 4, 7, 4)}


def fill_blocks(layout: Layout) -> Blocks:
    """Blocks of a unit in which nothing is."""
    return {
        spec.name: np.full((layout.rows_per_shard, *spec.row_shape), spec.fill, spec.dtype) for spec in layout.arrays
    }


def unit_blocks(layout: Layout, status: tuple[int, ...], seed: int = 0) -> Blocks:
    """Blocks of a unit with random data where ``status`` is OK."""
    rng = np.random.default_rng(seed)
    blocks = fill_blocks(layout)
    for spec in layout.arrays[:-1]:
        for row in np.flatnonzero(np.array(status) == OK):
            if spec.dtype.startswith("float"):
                blocks[spec.name][row] = rng.normal(size=spec.row_shape)
            else:
                blocks[spec.name][row] = rng.integers(1, 200, spec.row_shape) if spec.name != "valid" else 1
    blocks["status"][: len(status)] = status
    return blocks


def read_all(url: str, codecs: Literal["zarr", "zarrs"] = "zarr") -> Blocks:
    names = [spec.name for spec in stored_layout(url).arrays]
    return {name: np.asarray(array[:]) for name, array in open_arrays(url, names, codecs).items()}


def objects(url: str) -> dict[str, bytes]:
    """Name and bytes of every chunk and shard."""
    names = [name for name in storage.list_files(url) if "/c/" in name]
    return {name.removeprefix("features.zarr/"): storage.read_bytes(storage.join(url, name)) for name in names}


def assert_same(found: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]], what: str = "") -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, (what, name)
        # Bytes, so that NaN is NaN and -0 is not 0.
        assert found[name].tobytes() == values.tobytes(), (what, name)


def test_what_is_written_is_read(url: str) -> None:
    create_store(url, LAYOUT, IDENTITY)
    units = [unit_blocks(LAYOUT, (OK, FAILED, OK, OK), 1), unit_blocks(LAYOUT, (OK, OK, FAILED), 2)]
    for number in (1, 0):
        StoreWriter(url, LAYOUT).write(KEYS[number], units[number])
    wanted = {name: np.concatenate([units[0][name], units[1][name]]) for name in units[0]}
    for codecs in ("zarr", "zarrs") if storage.is_local(url) else ("zarr",):
        assert_same(read_all(url, codecs), wanted, codecs)


def test_plain_zarr_reads_a_store(local: str) -> None:
    blocks = unit_blocks(LAYOUT, (OK, OK, FAILED, OK))
    StoreWriter(local, LAYOUT).write(KEYS[0], blocks)
    group = zarr.open(f"{local}/features.zarr", mode="r")
    assert isinstance(group, zarr.Group)
    shapes = {name: array.shape for name, array in group.arrays()}
    assert shapes == {
        "features": (8, 6, 10, 3), "image": (8, 6, 10, 3), "seg": (8, 6, 10), "depth": (8, 6, 10), "cls": (8,),
        "valid": (8, 6, 10), "status": (8,),
    }  # fmt: skip
    assert_same({name: np.asarray(array[:4]) for name, array in group.arrays()}, blocks)
    for name, last in (("features", "channel"), ("image", "rgb")):
        metadata = json.loads((Path(local) / "features.zarr" / name / "zarr.json").read_text())
        assert metadata["dimension_names"] == ["row", "y", "x", last]
    assert {name: array.dtype.name for name, array in group.arrays()} == {
        "features": "float16", "image": "uint8", "seg": "uint8", "depth": "float32", "cls": "int64", "valid": "uint8",
        "status": "uint8",
    }  # fmt: skip


def test_a_shard_is_a_unit_and_a_chunk_is_a_tile_with_all_channels(local: str) -> None:
    arrays = open_arrays(local, ["features", "image", "seg", "cls"])
    assert (arrays["features"].shards, arrays["features"].chunks) == ((4, 8, 12, 3), (1, 4, 4, 3))
    assert (arrays["image"].shards, arrays["image"].chunks) == ((4, 8, 12, 3), (1, 4, 4, 3)), "as the features"
    assert (arrays["seg"].shards, arrays["seg"].chunks) == ((4, 6, 10), (1, 6, 10))
    assert (arrays["cls"].shards, arrays["cls"].chunks) == (None, (4,))


def test_nothing_written_reads_as_nothing(url: str) -> None:
    create_store(url, LAYOUT, IDENTITY)
    found = read_all(url)
    assert np.isnan(found["features"]).all()
    assert np.isnan(found["depth"]).all()
    assert {name: np.unique(found[name]).tolist() for name in ("image", "seg", "cls", "valid", "status")} == {
        "image": [0], "seg": [255], "cls": [-1], "valid": [0], "status": [0],
    }  # fmt: skip
    assert objects(url) == {}


def test_holes_cost_no_bytes(local: str) -> None:
    writer = StoreWriter(local, LAYOUT)
    full = writer.write(KEYS[0], unit_blocks(LAYOUT, (OK, OK, OK, OK)))
    part = writer.write(KEYS[1], unit_blocks(LAYOUT, (OK,)))
    sizes = {name: len(data) for name, data in objects(local).items()}
    assert full + part == sum(sizes.values())
    # The index of a shard has 16 bytes for each of its chunks, there or not, and a checksum of 4.
    index = 16 * 4 * 2 * 3 + 4
    assert sizes["features/c/1/0/0/0"] - index == pytest.approx((sizes["features/c/0/0/0/0"] - index) / 4, rel=0.1)


def test_a_unit_of_failures_has_a_status_and_no_other_object(local: str) -> None:
    stored = StoreWriter(local, LAYOUT).write(KEYS[0], unit_blocks(LAYOUT, (FAILED, FAILED)))
    found = objects(local)
    assert list(found) == ["status/c/0"]
    assert stored == len(found["status/c/0"])
    assert read_all(local)["status"].tolist() == [FAILED, FAILED, 0, 0, 0, 0, 0, 0]


def test_writing_a_unit_again_replaces_all_of_it(url: str) -> None:
    create_store(url, LAYOUT, IDENTITY)
    writer = StoreWriter(url, LAYOUT)
    kept = unit_blocks(LAYOUT, (OK, OK, OK), 3)
    writer.write(KEYS[1], kept)
    before = objects(url)
    writer.write(KEYS[0], unit_blocks(LAYOUT, (OK, OK, OK, OK), 1))
    again = unit_blocks(LAYOUT, (OK, FAILED, OK, OK), 2)
    writer.write(KEYS[0], again)
    assert_same({name: values[:4] for name, values in read_all(url).items()}, again)
    writer.write(KEYS[0], fill_blocks(LAYOUT))
    assert objects(url) == before


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name, order in (("a", (0, 1)), ("b", (1, 0)), ("c", (0, 1, 0))):
        create_store(str(tmp_path / name), LAYOUT, IDENTITY)
        for number in order:
            status = (OK, OK, FAILED, OK)
            StoreWriter(str(tmp_path / name), LAYOUT).write(KEYS[number], unit_blocks(LAYOUT, status, number))
        files = sorted((tmp_path / name).rglob("*"))
        found.append({str(f.relative_to(tmp_path / name)): f.read_bytes() for f in files if f.is_file()})
    assert len(found[0]) == 8 + 2 * 7
    assert found[0] == found[1] == found[2]


BIG = dataclasses.replace(LAYOUT, rows=48, rows_per_shard=4, height=32, width=32, channels=8, tile=(16, 16))


def _write_every_other(url: str, first: int, barrier: Any) -> None:
    writer = StoreWriter(url, BIG)
    barrier.wait(60)
    for number in range(first, 12, 2):
        writer.write(UnitKey(number, 0, 0, 4, 4 * number), unit_blocks(BIG, (OK, OK, OK, OK), number))


def test_processes_that_write_neighbouring_units_lose_nothing(tmp_path: Path) -> None:
    create_store(str(tmp_path), BIG, IDENTITY)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_write_every_other, args=(str(tmp_path), n, barrier)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    units = [unit_blocks(BIG, (OK, OK, OK, OK), number) for number in range(12)]
    assert_same(read_all(str(tmp_path)), {name: np.concatenate([unit[name] for unit in units]) for name in units[0]})


def _changed(blocks: Blocks, name: str, values: NDArray[Any] | None) -> Blocks:
    rest = {key: block for key, block in blocks.items() if key != name}
    return rest if values is None else {**rest, name: values}


WHOLE = unit_blocks(LAYOUT, (OK, OK, OK, OK))


@pytest.mark.parametrize(
    ("row", "blocks", "text"),
    [
        (
            2,
            WHOLE,
            "at row 2; a unit begins a shard of 4 rows, below row 8, and has all of ['cls', 'depth', 'features'",
        ),
        (8, WHOLE, "at row 8; a unit begins a shard of 4 rows, below row 8, and has all of"),
        (
            4,
            _changed(WHOLE, "seg", None),
            "writing ['cls', 'depth', 'features', 'image', 'status', 'valid'] at row 4; ",
        ),
        (4, _changed(WHOLE, "more", WHOLE["seg"]), "writing ['cls', 'depth', 'features', 'image', 'more', 'seg', "),
        (
            4,
            _changed(WHOLE, "features", WHOLE["features"][:3]),
            "features is float16 (3, 6, 10, 3), the store takes float16 (4, 6, 10, 3)",
        ),
        (
            4,
            _changed(WHOLE, "features", WHOLE["features"].transpose(0, 2, 1, 3)),
            "features is float16 (4, 10, 6, 3), the store takes float16 (4, 6, 10, 3)",
        ),
        (
            4,
            _changed(WHOLE, "features", WHOLE["features"].astype(np.float32)),
            "features is float32 (4, 6, 10, 3), the store takes float16 (4, 6, 10, 3)",
        ),
        (4, _changed(WHOLE, "status", WHOLE["status"][:, None]), "status is uint8 (4, 1), the store takes uint8 (4,)"),
    ],
    ids=["misaligned", "beyond", "missing", "unknown", "short", "transposed", "type", "status"],
)
def test_blocks_that_are_no_whole_unit_are_refused(local: str, row: int, blocks: Blocks, text: str) -> None:
    key = UnitKey(1, 0, 4, 8, row)
    with pytest.raises(StoreError, match=re.escape(text)) as caught:
        StoreWriter(local, LAYOUT).write(key, blocks)
    assert str(caught.value).startswith(str(key))
    assert objects(local) == {}, "nothing is written of a unit that is refused"


def test_rows_that_are_no_whole_shards_are_refused() -> None:
    with pytest.raises(StoreError, match="10 rows are not whole shards of 4: two workers would write to one shard"):
        dataclasses.replace(LAYOUT, rows=10)


def test_sizes_of_arrays() -> None:
    assert LAYOUT.sample_bytes == 6 * 10 * 3 * 2 + 6 * 10 * 3 + 6 * 10 + 6 * 10 * 4 + 8 + 6 * 10 + 1
    assert [spec.name for spec in LAYOUT.arrays] == ["features", "image", "seg", "depth", "cls", "valid", "status"]
    wide = dataclasses.replace(LAYOUT, labels=("seg",), seg_dtype="uint16", valid_mask=False, image=False)
    assert [(spec.name, spec.dtype, spec.fill) for spec in wide.arrays[1:]] == [
        ("seg", "uint16", 65535), ("status", "uint8", 0),
    ]  # fmt: skip


EVEN = dataclasses.replace(LAYOUT, tile=(3, 5))


@pytest.mark.parametrize("name", ["features", "seg", "cls", "status"])
@pytest.mark.parametrize(
    ("layout", "codecs"), [(LAYOUT, "zarr"), (EVEN, "zarr"), (EVEN, "zarrs")], ids=["ragged", "even", "even-zarrs"]
)
def test_a_flipped_bit_is_never_read_as_data(
    tmp_path: Path, layout: Layout, codecs: Literal["zarr", "zarrs"], name: str
) -> None:
    url = str(tmp_path)
    create_store(url, layout, IDENTITY)
    blocks = unit_blocks(layout, (OK, OK, OK, OK))
    StoreWriter(url, layout).write(KEYS[0], blocks)
    (place,) = [tmp_path / "features.zarr" / found for found in objects(url) if found.startswith(f"{name}/")]
    whole = place.read_bytes()
    array = open_arrays(url, [name], codecs)[name]
    rng = np.random.default_rng(0)
    for position in rng.choice(len(whole), min(len(whole), 40), replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        place.write_bytes(damaged)
        # What a codec raises is the library's choice; that it does is the point.
        with pytest.raises(Exception, match=r"(?i)checksum|crc|invalid|corrupt|range|byte|size|decod|blosc"):
            array[:4]
        if array.ndim > 1 and codecs == "zarr":
            # One row touches a part of the chunks only: it is what it was, or it is refused.
            with suppress(ValueError):
                assert np.asarray(array[1]).tobytes() == blocks[name][1].tobytes()
    place.write_bytes(whole)
    assert np.asarray(array[:4]).tobytes() == blocks[name].tobytes()


def test_the_checksum_of_a_row_is_that_of_its_bytes() -> None:
    row = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    wanted = google_crc32c.value(b"".join(value.astype("<f2").tobytes() for value in row.ravel()))
    assert row_checksum(row) == wanted
    assert row_checksum(row.transpose(2, 0, 1).copy().transpose(1, 2, 0)) == wanted, "whatever its strides"
    assert google_crc32c.value(b"123456789") == 0xE3069283, "Castagnoli's polynomial"


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.integers(1, 4096), st.none() | st.integers(1, 500))
def test_tiles_are_even_and_as_large_as_allowed(size: tuple[int, int], channels: int, wanted: int | None) -> None:
    tile = tile_of(size, channels, wanted)
    for side, piece in zip(size, tile, strict=True):
        small, large = (int(np.sqrt(size * 1024 / (2 * channels))) for size in (64, 640))
        most = wanted or min(side, max(1, small, min(-(-side // 4), large)))
        count = -(-side // piece)
        assert 1 <= piece <= most
        if wanted is not None:
            assert count == -(-side // most), "not more tiles than needed"
        assert count <= max(2, 2 * -(-side // most)), "at most twice as many as needed, where these divide the side"
        assert piece * count - side < count, "they differ from each other by less than a pixel a tile"
    if wanted is None and channels <= 320 * 1024:
        assert 2 * channels * tile[0] * tile[1] <= 640 * 1024


def test_known_tiles() -> None:
    assert tile_of((224, 224), 384, None) == (28, 28)
    assert tile_of((224, 224), 64, None) == (56, 56)
    assert tile_of((224, 224), 32, None) == (56, 56), "a quarter of the side"
    assert tile_of((96, 64), 32, None) == (32, 32), "not smaller than 64 KiB"
    assert tile_of((32, 48), 8, None) == (32, 48)
    assert tile_of((227, 229), 64, None) == (57, 58), "nothing divides them"
    assert tile_of((448, 1024), 384, None) == (28, 16)
    assert tile_of((352, 480), 384, 60) == (59, 60)
    assert tile_of((7, 7), 8, 100) == (7, 7)

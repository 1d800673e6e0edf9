"""Our reader of shards against zarr-python's, and what becomes of shards that are damaged or replaced."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, GzipCodec

from pipeline.errors import StoreError, StoreFormatError
from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey
from pipeline.store.create import create_store
from pipeline.store.layout import FAILED, OK, Codec, Layout, open_arrays
from pipeline.store.open_shards import OpenShards
from pipeline.store.shard_reader import ArrayReader, Window
from pipeline.store.writer import StoreWriter
from tests.pipeline.store.test_layout import IDENTITY, KEYS, LAYOUT, unit_blocks

ARRAYS = [spec.name for spec in LAYOUT.arrays]
SIZE = (LAYOUT.height, LAYOUT.width)


def readers(url: str, layout: Layout = LAYOUT, shards: OpenShards | None = None) -> dict[str, ArrayReader]:
    arrays = open_arrays(url, [spec.name for spec in layout.arrays])
    return {
        spec.name: ArrayReader.of(url, arrays[spec.name], spec, layout.rows_per_shard, shards) for spec in layout.arrays
    }


def write(url: str, layout: Layout = LAYOUT, seed: int = 0) -> None:
    create_store(url, layout, IDENTITY)
    for number, key in KEYS.items():
        StoreWriter(url, layout).write(key, unit_blocks(layout, (OK,) * 4, seed + number))


def read(reader: ArrayReader, row: int, window: Window | None = None, mirrored: bool = False) -> np.ndarray:
    shape = reader.spec.row_shape if window is None else (*window[2:], *reader.spec.row_shape[2:])
    types = {"uint8": torch.uint8, "uint16": torch.int64, "int64": torch.int64, "float32": torch.float32}
    out = torch.full(shape, 77, dtype=types.get(reader.spec.dtype, torch.float16))
    reader.read(row, out, window, mirrored)
    return out.numpy()


@pytest.fixture(scope="module", params=["path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reader")
    place = str(folder) if request.param == "path" else f"memory://test_shard_reader{folder}"
    write(place)
    return place


sides = st.tuples(st.integers(0, SIZE[0]), st.integers(0, SIZE[0])).filter(lambda pair: pair[0] < pair[1])
across = st.tuples(st.integers(0, SIZE[1]), st.integers(0, SIZE[1])).filter(lambda pair: pair[0] < pair[1])


@settings(max_examples=60, deadline=None)
@given(rows=sides, columns=across, row=st.integers(0, 7), mirrored=st.booleans(), name=st.sampled_from(ARRAYS))
def test_every_window_is_what_zarr_reads(
    url: str, rows: tuple[int, int], columns: tuple[int, int], row: int, mirrored: bool, name: str
) -> None:
    reader, whole = readers(url)[name], np.asarray(open_arrays(url, [name])[name][row])
    if whole.ndim < 2:
        assert read(reader, row) == whole
        return
    found = read(reader, row, (rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0]), mirrored)
    wanted = whole[slice(*rows), slice(*columns)]
    assert np.array_equal(found, wanted[:, ::-1] if mirrored else wanted, equal_nan=wanted.dtype.kind == "f")


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
@pytest.mark.parametrize("seg_dtype", ["uint8", "uint16"])
def test_every_codec_is_read_and_is_zarrs_own(tmp_path: Path, codec: Codec, seg_dtype: str) -> None:
    layout = dataclasses.replace(LAYOUT, codec=codec, seg_dtype=seg_dtype)
    write(str(tmp_path), layout)
    plain = zarr.open_group(tmp_path / "features.zarr", mode="r")
    fast = open_arrays(str(tmp_path), ARRAYS, "zarrs")
    for name, reader in readers(str(tmp_path), layout).items():
        for row in range(7):
            wanted = np.asarray(plain[name][row])  # type: ignore[index]
            assert np.array_equal(read(reader, row), wanted, equal_nan=wanted.dtype.kind == "f"), (name, row)
            if wanted.ndim >= 2:
                turned = read(reader, row, (0, 0, *SIZE), mirrored=True)
                assert np.array_equal(turned, wanted[:, ::-1], equal_nan=wanted.dtype.kind == "f"), (name, row)
            assert np.array_equal(np.asarray(fast[name][row]), wanted, equal_nan=wanted.dtype.kind == "f"), (name, row)


def test_codecs_store_more_or_less(tmp_path: Path) -> None:
    sizes = {}
    for codec in ("none", "lz4", "zstd"):
        layout = dataclasses.replace(LAYOUT, codec=codec, height=64, width=64, tile=(32, 32))
        url = str(tmp_path / codec)
        create_store(url, layout, IDENTITY)
        blocks = unit_blocks(layout, (OK,) * 4)
        blocks["features"][:] = np.linspace(0, 1, 64, dtype=np.float16)[:, None]
        sizes[codec] = StoreWriter(url, layout).write(KEYS[0], blocks)
    assert sizes["none"] > 1.5 * sizes["lz4"]
    assert sizes["none"] > 1.5 * sizes["zstd"]


def place_of(url: str, name: str) -> Path:
    (place,) = [one for one in storage.list_files(url) if one.startswith(f"features.zarr/{name}/c/0")]
    return Path(url, place)


@pytest.mark.parametrize("name", ["features", "image", "seg", "cls"])
def test_a_flipped_bit_is_an_error_and_never_a_value(tmp_path: Path, name: str) -> None:
    write(str(tmp_path))
    place = place_of(str(tmp_path), name)
    data = place.read_bytes()
    wanted = [read(readers(str(tmp_path))[name], row) for row in range(4)]
    for position in range(0, len(data), max(1, len(data) // 40)):
        place.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
        reader, failed = readers(str(tmp_path))[name], []
        for row in range(4):
            try:
                assert np.array_equal(read(reader, row), wanted[row], equal_nan=wanted[row].dtype.kind == "f")
            except StoreError as error:
                failed.append((f"{place}, row {row}: ", str(error)))
        assert failed, f"nothing is said of byte {position}"
        for beginning, text in failed:
            assert text.startswith(beginning)
            assert text.endswith(
                f"the store is damaged; featup verify {tmp_path} --repair, then run the job that made it again"
            )


@pytest.mark.parametrize("length", [0, 3, 400])
def test_a_shard_that_was_cut_is_an_error(tmp_path: Path, length: int) -> None:
    write(str(tmp_path))
    place = place_of(str(tmp_path), "features")
    place.write_bytes(place.read_bytes()[:length])
    with pytest.raises(StoreError, match=r"row 1: (it has \d+ bytes, and its index alone has|its index is not what)"):
        read(readers(str(tmp_path))["features"], 1)


def test_missing_features_are_an_error_and_missing_labels_are_unknown(tmp_path: Path) -> None:
    """Zarr reads both as the fill value, and a probe would be trained on NaN."""
    write(str(tmp_path))
    for name in ("features", "seg", "cls"):
        place_of(str(tmp_path), name).unlink()
    found = readers(str(tmp_path))
    with pytest.raises(StoreError, match="row 2: a chunk of the features of a good sample is missing: the store is"):
        read(found["features"], 2)
    assert (read(found["seg"], 2) == 255).all()
    assert read(found["cls"], 2) == -1


def test_a_shard_that_is_replaced_meanwhile_is_read_as_it_was_or_as_it_is(tmp_path: Path) -> None:
    for url in (str(tmp_path / "a"), f"memory://test_replaced{tmp_path}"):
        write(url)
        reader = readers(url)["features"]
        before = read(reader, 0)
        StoreWriter(url, LAYOUT).write(KEYS[0], unit_blocks(LAYOUT, (OK,) * 4, 99))
        after = np.asarray(open_arrays(url, ["features"])["features"][0])
        assert not np.array_equal(before, after)
        assert np.array_equal(read(reader, 0), before if storage.is_local(url) else after)


def test_arrays_that_others_encoded_are_refused_by_name(tmp_path: Path) -> None:
    write(str(tmp_path))
    group = zarr.open_group(tmp_path / "features.zarr", mode="r+")
    group.create_array(
        "features", shape=(8, 6, 10, 3), chunks=(1, 4, 4, 3), dtype="float16", overwrite=True,
        serializer=BytesCodec(), compressors=[GzipCodec()],
    )  # fmt: skip
    with pytest.raises(
        StoreFormatError, match=r"the array features has chunks of .* by \['bytes', 'gzip'\], where its"
    ):
        readers(str(tmp_path))


def test_an_object_that_is_replaced_by_one_with_more_samples_is_not_read_by_its_old_index(tmp_path: Path) -> None:
    """Without compression all chunks are equally long: the old index names intact chunks of other samples."""
    url, layout = f"memory://test_shifted{tmp_path}", dataclasses.replace(LAYOUT, codec="none")
    create_store(url, layout, IDENTITY)
    blocks = unit_blocks(layout, (FAILED, OK, OK, OK))
    StoreWriter(url, layout).write(KEYS[0], blocks)
    now = [0.0]
    reader = readers(url, layout, OpenShards(clock=lambda: now[0]))["features"]
    assert np.array_equal(read(reader, 1), blocks["features"][1])
    blocks["features"][0] = blocks["features"][1] + 1
    StoreWriter(url, layout).write(KEYS[0], blocks)
    now[0] = 61.0
    for row in range(4):
        assert np.array_equal(read(reader, row), blocks["features"][row]), row
    storage.remove(storage.join(url, "features.zarr", "features", "c/0/0/0/0"))
    # Its index is trusted still; then it is looked for.
    with pytest.raises(StoreError, match="row 1: a chunk of the features of a good sample is missing"):
        read(reader, 1)


def test_a_file_that_is_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    """What was read before lay in the memory still, and was taken for the row's."""
    layout = dataclasses.replace(LAYOUT, codec="none")
    write(str(tmp_path), layout)
    reader = readers(str(tmp_path), layout)["features"]
    read(reader, 0)
    os.truncate(place_of(str(tmp_path), "features"), 0)
    with pytest.raises(StoreError, match="row 1: it has 0 bytes, and its index alone has"):
        read(reader, 1)


def opened(folder: Path) -> int:
    """How many descriptors of this process are of files in a folder."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, by another thread
            count += os.readlink(link).startswith(str(folder))
    return count


def test_files_are_closed(tmp_path: Path) -> None:
    write(str(tmp_path))
    reader = readers(str(tmp_path))["features"]
    read(reader, 0)
    read(reader, 5)
    assert opened(tmp_path) == 2
    del reader
    assert opened(tmp_path) == 0


def test_so_many_files_are_open_and_no_more(tmp_path: Path) -> None:
    """Each thread and each array had 64 of its own, and a training ran out of descriptors."""
    layout = dataclasses.replace(LAYOUT, rows=80)
    create_store(str(tmp_path), layout, IDENTITY)
    for shard in range(20):
        StoreWriter(str(tmp_path), layout).write(
            UnitKey(shard, 0, 4 * shard, 4 * shard + 4, 4 * shard), unit_blocks(layout, (OK,) * 4, shard)
        )
    all_readers = readers(str(tmp_path), layout, OpenShards(most_files=7))
    whole = np.asarray(open_arrays(str(tmp_path), ["features"])["features"][:])

    def task(thread: int) -> None:
        mine = {name: reader.copy() for name, reader in all_readers.items()}
        for row in np.random.default_rng(thread).permutation(80).tolist():
            assert np.array_equal(read(mine["features"], row), whole[row])
            read(mine["seg"], row)
            assert opened(tmp_path) <= 7 + 2 * 4, "those of the table, and what a thread reads now"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(task, range(4)))
    assert opened(tmp_path) == 7

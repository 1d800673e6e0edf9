"""Our reader of shards against zarr-python's, and what becomes of shards that are damaged or replaced."""

import dataclasses
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
from pipeline.store.create import create_store
from pipeline.store.layout import OK, Codec, Layout, open_arrays
from pipeline.store.shard_reader import ArrayReader, Window
from pipeline.store.writer import StoreWriter
from tests.pipeline.store.test_layout import IDENTITY, KEYS, LAYOUT, unit_blocks

ARRAYS = [spec.name for spec in LAYOUT.arrays]
SIZE = (LAYOUT.height, LAYOUT.width)


def readers(url: str, layout: Layout = LAYOUT) -> dict[str, ArrayReader]:
    arrays = open_arrays(url, [spec.name for spec in layout.arrays])
    return {spec.name: ArrayReader.of(url, arrays[spec.name], spec, layout.rows_per_shard) for spec in layout.arrays}


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


def test_files_are_closed(tmp_path: Path) -> None:
    write(str(tmp_path))

    def opened() -> int:
        return sum(str(tmp_path) in str(link.resolve()) for link in Path("/proc/self/fd").iterdir())

    reader = readers(str(tmp_path))["features"]
    read(reader, 0)
    read(reader, 5)
    assert opened() == 2
    del reader
    assert opened() == 0

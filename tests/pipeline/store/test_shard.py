"""Our shards are Zarr's: what both of its readers make of them, on odd shapes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from pipeline.store.create import create_store
from pipeline.store.layout import Layout, open_arrays, open_group
from pipeline.store.shard import encode_shard
from pipeline.store.writer import chunk_key

SHAPES = {
    "even": ((8, 12, 3), (4, 4)),
    "ragged": ((9, 13, 5), (4, 6)),
    "one tile": ((5, 7, 2), (5, 7)),
    "one pixel tiles": ((3, 2, 1), (1, 1)),
}


def _store(folder: Path, shape: tuple[int, int, int], tile: tuple[int, int], rows: int) -> str:
    layout = Layout(2 * rows, rows, shape[0], shape[1], shape[2], tile, (), "uint8", False, 1)
    create_store(str(folder), layout, {"identity": {}})
    return str(folder)


def _put(url: str, shard: int, data: bytes) -> None:
    array = open_group(url)["features"]
    assert isinstance(array, zarr.Array)
    path = Path(url, "features.zarr", "features", chunk_key(array, shard))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _encode(block: NDArray[np.float16], tile: tuple[int, int]) -> bytes:
    with ThreadPoolExecutor(2) as pool:
        return b"".join(encode_shard(block, (*tile, block.shape[-1]), float("nan"), "zstd", 1, pool))


@pytest.mark.parametrize("name", SHAPES)
def test_both_readers_read_what_was_written(name: str, tmp_path: Path) -> None:
    shape, tile = SHAPES[name]
    rng = np.random.default_rng(0)
    block = rng.normal(size=(3, *shape)).astype(np.float16)
    block[1] = np.nan
    url = _store(tmp_path, shape, tile, rows=3)
    _put(url, 1, _encode(block, tile))
    for codecs in ("zarr", "zarrs"):
        array = open_arrays(url, ["features"], codecs)["features"]  # type: ignore[arg-type]
        assert np.array_equal(array[3:6], block, equal_nan=True), codecs
        assert np.array_equal(array[5, 1:3, 1:], block[2, 1:3, 1:]), codecs
        assert np.isnan(np.asarray(array[0:3])).all(), codecs


def test_zarr_python_writes_the_same_chunks(tmp_path: Path) -> None:
    """The same encoded chunks, whatever their order in the shard: sizes and values agree with the library's own."""
    shape, tile = SHAPES["ragged"]
    block = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float16)
    url = _store(tmp_path / "ours", shape, tile, rows=3)
    _put(url, 0, _encode(block, tile))
    theirs = _store(tmp_path / "theirs", shape, tile, rows=3)
    array = open_group(theirs, mode="r+")["features"]
    assert isinstance(array, zarr.Array)
    array[0:3] = block
    sizes = [Path(one, "features.zarr", "features", "c", "0", "0", "0", "0").stat().st_size for one in (url, theirs)]
    assert sizes[0] == sizes[1]
    assert np.array_equal(open_arrays(url, ["features"])["features"][0:3], block)


def test_a_shard_of_fill_values_is_no_object_and_empty_chunks_are_left_out() -> None:
    block = np.full((2, 4, 4, 3), np.nan, np.float16)
    assert _encode(block, (2, 2)) == b""
    empty_index = 2 * 4 * 16 + 4
    block[1, 3, 3, 0] = 1.0
    data = _encode(block, (2, 2))
    index = np.frombuffer(data[-empty_index:-4], "<u8").reshape(8, 2)
    assert (index[:7] == 2**64 - 1).all()
    assert index[7, 0] == 0
    assert index[7, 1] == len(data) - empty_index


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    block = np.random.default_rng(2).normal(size=(2, 8, 8, 4)).astype(np.float16)
    data = bytearray(_encode(block, (8, 8)))
    data[40] ^= 1
    url = _store(tmp_path, (8, 8, 4), (8, 8), rows=2)
    _put(url, 0, bytes(data))
    with pytest.raises(ValueError, match="checksum"):
        open_arrays(url, ["features"])["features"][0]

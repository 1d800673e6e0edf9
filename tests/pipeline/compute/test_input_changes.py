"""What went in is what it was: shards that changed, moved or were added since a store was begun."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.compute.prepare import units_to_retry
from pipeline.compute.source_check import check_source
from pipeline.errors import InputChangedError, InputError
from pipeline.store.index import read_index
from pipeline.store.layout import open_arrays
from tests.e2e.support import array_files, encode, good_sample, photograph, write_tar
from tests.pipeline.compute.support import Store, make_config, open_store


def depth_sample(key: str, seed: int, depth: int) -> list[tuple[str, bytes]]:
    label = np.full((60, 80), depth * 1000, np.uint16)
    return [(f"{key}.jpg", encode(photograph(seed))), (f"{key}.depth.png", encode(label, "PNG", compress_level=0))]


def write_shard(path: Path, first: int, count: int, depth: int = 1) -> Path:
    return write_tar(path, [member for n in range(first, first + count) for member in depth_sample(f"k{n}", n, depth)])


def depths(store: Store) -> list[float]:
    root = zarr.open_group(Path(store.config.out) / "features.zarr", mode="r")
    return np.asarray(root["depth"][:, 0, 0]).tolist()


def begin(folder: Path, **options: object) -> Store:
    return open_store(make_config(folder / "*.tar", folder / "out", labels=("depth",), **options))


def test_a_tar_rewritten_in_mid_run_is_refused_by_name_before_anything_is_mixed(tmp_path: Path) -> None:
    """Stored depths were 1 1 1 1 7 7 7 7, exit status 0: the same size, names, header times, and other labels."""
    write_shard(tmp_path / "a.tar", 0, 8)
    store = begin(tmp_path)
    store.run(units=1)
    size = (tmp_path / "a.tar").stat().st_size
    write_shard(tmp_path / "a.tar", 0, 8, depth=7)
    assert (tmp_path / "a.tar").stat().st_size == size
    with pytest.raises(InputChangedError, match=r"a\.tar changed while the job ran"):
        store.load(1)
    before = array_files(tmp_path / "out")
    with pytest.raises(InputChangedError, match=r"a\.tar: sample k0 has other bytes"):
        begin(tmp_path)
    assert array_files(tmp_path / "out") == before


def test_equal_bytes_at_another_place_and_time_go_on(tmp_path: Path) -> None:
    """Data that moved were refused: a shard was known by its URL."""
    first = tmp_path / "first"
    write_shard(first / "a.tar", 0, 8)
    store = open_store(make_config(first / "a.tar", tmp_path / "out", labels=("depth",)))
    store.run(units=1)
    second = tmp_path / "second"
    shutil.move(first, second)
    os.utime(second / "a.tar", (1, 1))
    again = open_store(make_config(second / "a.tar", tmp_path / "out", labels=("depth",)))
    assert len(again.lines) == 1
    assert "4 samples of 1 of its 1 finished units compared" in again.lines[0]
    assert again.run().ok == 8
    assert depths(again) == [1.0] * 8
    assert not open_store(again.config).lines, "the plan names the new place, nothing is compared again"


def test_other_names_are_refused_with_the_member_that_differs(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", 0, 8)
    begin(tmp_path).run(units=1)
    write_shard(tmp_path / "a.tar", 1, 8)
    with pytest.raises(InputChangedError, match=r"a\.tar.*k1"):
        begin(tmp_path)


def test_a_share_of_the_finished_units_is_compared_on_request(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", 0, 16)
    begin(tmp_path).run()
    os.utime(tmp_path / "a.tar", (1, 1))
    lines = begin(tmp_path, recheck_share=0.3).lines
    assert "8 samples of 2 of its 4 finished units compared" in lines[0]


def test_shards_are_appended_and_what_is_there_stays(tmp_path: Path) -> None:
    write_shard(tmp_path / "b.tar", 0, 6)
    store = begin(tmp_path, pca=3)
    assert store.run().ok == 6
    before, pca = array_files(tmp_path / "out"), (tmp_path / "out/plan/pca.safetensors").read_bytes()
    # It sorts before the old one, and comes behind it all the same.
    write_shard(tmp_path / "a.tar", 100, 3, depth=2)
    grown = begin(tmp_path, pca=3)
    assert [shard.url.rsplit("/", 1)[-1] for shard in grown.plan.shards] == ["b.tar", "a.tar"]
    assert grown.ledger.done().todo(grown.plan.units).tolist() == [2], "old receipts count"
    assert grown.run().ok == 9
    after = array_files(tmp_path / "out")
    assert {name: after[name] for name in before if not name.endswith("zarr.json")} == {
        name: data for name, data in before.items() if not name.endswith("zarr.json")
    }
    assert (tmp_path / "out/plan/pca.safetensors").read_bytes() == pca
    table = read_index(str(tmp_path / "out"), ["row", "key"]).to_pylist()
    assert [(row["row"], row["key"]) for row in table[-3:]] == [(8, "k100"), (9, "k101"), (10, "k102")]
    assert depths(grown)[:11] == [1.0] * 6 + [pytest.approx(np.nan, nan_ok=True)] * 2 + [2.0] * 3


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", 0, 4)
    write_shard(tmp_path / "b.tar", 4, 4)
    begin(tmp_path).run(units=1)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(InputError, match=r"b\.tar"):
        begin(tmp_path)


def test_units_with_failed_samples_are_found_by_their_reasons(tmp_path: Path) -> None:
    members = [*good_sample("k0", 0), ("k1.jpg", b"no image"), ("k1.seg.png", good_sample("k1", 1)[1][1])]
    members += [("k2.jpg", encode(photograph(2))), *good_sample("k3", 3)]
    write_tar(tmp_path / "a.tar", members + [m for n in range(4, 8) for m in good_sample(f"k{n}", n)])

    def retried(*reasons: str) -> list[int]:
        config = make_config(tmp_path / "a.tar", tmp_path / "out", labels=("seg",), rows_per_shard=2)
        store = open_store(config)
        retry = make_config(
            tmp_path / "a.tar", tmp_path / "out", labels=("seg",), rows_per_shard=2, retry_failed=reasons
        )
        return units_to_retry(retry, store.plan, store.ledger)

    store = open_store(make_config(tmp_path / "a.tar", tmp_path / "out", labels=("seg",), rows_per_shard=2))
    store.run(units=3)
    unfinished = [retried(), retried("undecodable"), retried("label_missing"), retried("too_large")]
    store.run()
    finished = [retried(), retried("undecodable"), retried("label_missing"), retried("too_large")]
    assert unfinished == finished == [[0, 1], [0], [1], []]


def test_verification_reads_an_input_that_was_touched_or_moved_and_tells_other_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", 0, 4)
    store = begin(tmp_path)
    store.run()
    os.utime(tmp_path / "a.tar", (1, 1))

    def differences() -> list[str]:
        key = store.plan.unit(0)
        receipt = store.ledger.get(key, store.plan.shards[0].digest)
        assert receipt is not None
        return list(check_source(store.config.out, store.plan, key, receipt, open_arrays(store.config.out, ["depth"])))

    assert differences() == []
    write_shard(tmp_path / "a.tar", 0, 4, depth=7)
    # Not damage: set back and computed anew, the unit would mix two versions.
    with pytest.raises(InputChangedError, match=r"a\.tar: row 0 \(k0\) was made from other bytes"):
        differences()


def test_a_shard_that_is_put_back_after_it_was_refused_goes_on(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "a.tar", 0, 8)
    begin(tmp_path).run(units=1)
    shutil.copy2(tar, tmp_path / "kept")
    write_shard(tar, 1, 8)
    with pytest.raises(InputChangedError):
        begin(tmp_path)
    shutil.copy2(tmp_path / "kept", tar)
    assert begin(tmp_path).run().ok == 8

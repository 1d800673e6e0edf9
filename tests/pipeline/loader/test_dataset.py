import dataclasses
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.errors import ConfigError, IncompleteStoreError, SampleKeyError, StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard
from pipeline.loader import FeatureDataset, Window
from pipeline.store.create import create_store, declare_complete, withdraw_complete
from pipeline.store.index import write_index
from pipeline.store.keys import SampleKeys
from pipeline.store.layout import FAILED, OK, store_attributes
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
from pipeline.store.segments import receipt_place
from pipeline.store.writer import StoreWriter
from tests.pipeline.loader.conftest import ALL, GOOD, STATUS
from tests.pipeline.store.support import DIGEST, commit_statuses, finish_store, plan_of, put_receipts
from tests.pipeline.store.test_layout import IDENTITY, KEYS, LAYOUT, Blocks, unit_blocks

ROOT = Path(__file__).resolve().parents[3]


def test_only_good_rows_are_there(store: tuple[str, Blocks]) -> None:
    url, blocks = store
    dataset = FeatureDataset(url)
    assert len(dataset) == len(GOOD)
    samples = list(dataset)  # type: ignore[call-overload]
    assert [int(sample["row"]) for sample in samples] == GOOD
    for sample in samples:
        assert set(sample) == {"features", "row", "key"}
        assert sample["key"] == f"k{int(sample['row'])}"
        assert np.array_equal(sample["features"], blocks["features"][int(sample["row"])].astype(np.float32))
    assert int(dataset[-1]["row"]) == GOOD[-1]
    with pytest.raises(IndexError):
        dataset[len(GOOD)]


def test_a_store_without_a_good_sample_is_empty(tmp_path: Path) -> None:
    create_store(str(tmp_path), LAYOUT, IDENTITY)
    finish_store(str(tmp_path), ((FAILED,) * 4, (FAILED,)))
    assert len(FeatureDataset(str(tmp_path))) == 0


@pytest.mark.parametrize("place", ["path", "memory"])
def test_a_store_that_is_not_complete_is_served_on_request_only(tmp_path: Path, place: str) -> None:
    # It was served in part, without a word.
    url = str(tmp_path) if place == "path" else f"memory://test_dataset{tmp_path}"
    create_store(url, LAYOUT, IDENTITY)
    with pytest.raises(IncompleteStoreError, match=r"is not complete: .* run the job to its end, or give partial=True"):
        FeatureDataset(url)
    assert FeatureDataset(url, partial=True).rows.tolist() == []
    blocks = unit_blocks(LAYOUT, STATUS[0])
    StoreWriter(url, LAYOUT).write(KEYS[0], blocks)
    assert FeatureDataset(url, partial=True).rows.tolist() == [], "a unit counts when its receipt is there"
    commit_statuses(url, plan_of(7), STATUS[:1])
    dataset = FeatureDataset(url, partial=True)
    assert dataset.rows.tolist() == [0, 2, 3]
    assert np.array_equal(dataset[1]["features"], blocks["features"][2].astype(np.float32))
    finish_store(url, STATUS)
    assert FeatureDataset(url, partial=True).rows.tolist() == FeatureDataset(url).rows.tolist() == GOOD
    withdraw_complete(url)
    with pytest.raises(IncompleteStoreError):
        FeatureDataset(url)
    assert FeatureDataset(url, partial=True).rows.tolist() == GOOD


def test_rows_come_from_segments_as_well(tmp_path: Path) -> None:
    url, units = str(tmp_path), 2003
    layout = dataclasses.replace(LAYOUT, rows=4 * units)
    create_store(url, layout, IDENTITY)
    plan = plan_of(4 * units)
    statuses = np.random.default_rng(0).choice([OK, FAILED], (units, 4))
    records = [
        tuple(SampleRecord("k", 4 * unit + n, "ok" if status == OK else "failed") for n, status in enumerate(row))
        for unit, row in enumerate(statuses)
    ]
    ledger = Ledger(f"{url}/ledger")
    put_receipts(ledger.url, (Receipt(plan.unit(unit), DIGEST, one) for unit, one in enumerate(records)))
    wanted = np.flatnonzero(statuses.reshape(-1) == OK).tolist()
    assert ledger.compact(1)
    assert FeatureDataset(url, partial=True).rows.tolist() == wanted
    write_index(url, plan, ledger, {})
    declare_complete(url)
    assert FeatureDataset(url).rows.tolist() == wanted
    os.remove(f"{url}/index/000001.parquet")
    with pytest.raises(StoreError, match=r"index/000001\.parquet is missing, and .* is complete"):
        FeatureDataset(url)


def test_reading_needs_nothing_that_making_needs() -> None:
    names = ("ray", "timm", "jsonargparse", "PIL", "simplejpeg", "webdataset", "braceexpand", "matplotlib", "pandas")
    code = f"import sys, pipeline.loader; print([name for name in {names} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_types_and_values_of_every_array(store: tuple[str, Blocks]) -> None:
    url, blocks = store
    sample = FeatureDataset(url, ALL)[1]
    assert sample.pop("key") == "k2"
    types = {name: (value.dtype, tuple(value.shape)) for name, value in sample.items()}
    assert types == {
        "features": (torch.float32, (6, 10, 3)),
        "image": (torch.uint8, (6, 10, 3)),
        "seg": (torch.int64, (6, 10)),
        "depth": (torch.float32, (6, 10)),
        "cls": (torch.int64, ()),
        "valid": (torch.bool, (6, 10)),
        "row": (torch.int64, ()),
    }
    for name in ALL:
        assert np.array_equal(sample[name].numpy(), blocks[name][2].astype(sample[name].numpy().dtype)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_features_come_in_the_type_that_is_asked_for(store: tuple[str, Blocks], dtype: torch.dtype) -> None:
    url, blocks = store
    sample = FeatureDataset(url, ("features", "depth"), dtype=dtype)[0]
    assert sample["features"].dtype == dtype
    assert torch.equal(sample["features"], torch.from_numpy(blocks["features"][0]).to(dtype))
    assert sample["depth"].dtype == torch.float32, "metres are not features"


@pytest.mark.parametrize(
    "window", [(0, 0, 6, 10), (0, 0, 1, 1), (5, 9, 1, 1), (1, 3, 4, 5), (4, 4, 2, 4), (2, 0, 3, 10)], ids=str
)
def test_a_window_is_a_slice_of_the_whole(store: tuple[str, Blocks], window: Window) -> None:
    url, _ = store
    whole, part = FeatureDataset(url, ALL), FeatureDataset(url, ALL, window=window)
    top, left, height, width = window
    for index in range(len(GOOD)):
        wanted, found = whole[index], part[index]
        for name in ("features", "image", "seg", "depth", "valid"):
            assert found[name].shape[:2] == (height, width)
            cut = wanted[name][top : top + height, left : left + width]
            assert torch.equal(found[name].nan_to_num(-1.0), cut.nan_to_num(-1.0)), name
        assert (found["cls"], found["row"]) == (wanted["cls"], wanted["row"])


@pytest.mark.parametrize(
    "window", [(-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 0, 2), (0, 0, 2, 0), (5, 0, 2, 2), (0, 9, 2, 2)]
)
def test_a_window_outside_of_the_image_is_refused(store: tuple[str, Blocks], window: Window) -> None:
    text = f"window (top, left, height, width) = {window} is not inside the features' 6x10 (height x width)"
    with pytest.raises(ConfigError, match=re.escape(text)):
        FeatureDataset(store[0], window=window)


def test_arrays_that_are_not_there_are_refused(store: tuple[str, Blocks], tmp_path: Path) -> None:
    text = r"has no arrays \['status', 'boxes'\]; it has \['features', 'image', 'seg', 'depth', 'cls', 'valid'\]"
    with pytest.raises(ConfigError, match=text):
        FeatureDataset(store[0], ("features", "status", "boxes"))
    with pytest.raises(StoreError, match=f"no feature store at {tmp_path}; give the folder that was --out"):
        FeatureDataset(str(tmp_path))


def shards_of_two(url: str, keys: Sequence[str], complete: bool = True) -> None:
    """A store of two shards with four samples each, whose keys are given; the third of each shard failed."""
    shards = tuple(PlannedShard(f"s3://id:secret@bucket/{name}.tar", 1, "", 4, 4, (), DIGEST) for name in "ab")
    plan = Plan(shards, 4, "")
    create_store(url, LAYOUT, IDENTITY)
    storage.write_atomic(storage.join(url, "plan", "plan.json"), plan.to_json())
    ledger = Ledger(storage.join(url, "ledger"))
    for unit in range(2):
        StoreWriter(url, LAYOUT).write(KEYS[unit], unit_blocks(LAYOUT, (OK, OK, FAILED, OK), unit))
        records = [SampleRecord(keys[4 * unit + n], 4 * unit + n, "ok") for n in range(4)]
        records[2] = dataclasses.replace(records[2], status="failed", reason="truncated")
        ledger.commit(Receipt(plan.unit(unit), DIGEST, tuple(records)))
    if complete:
        write_index(url, plan, ledger, {})
        declare_complete(url)


@pytest.mark.parametrize("complete", [True, False], ids=["index", "receipts"])
@pytest.mark.parametrize("place", ["path", "memory"])
def test_a_sample_is_found_by_its_key(tmp_path: Path, place: str, complete: bool) -> None:
    url = str(tmp_path) if place == "path" else f"memory://test_keys{tmp_path}"
    shards_of_two(url, ["one", "two", "bad", "same", "same", "three", "bad", "four"], complete)
    dataset = FeatureDataset(url, ["features", "image"], partial=not complete)
    assert [sample["key"] for sample in map(dataset.__getitem__, range(6))] == [
        "one", "two", "same", "same", "three", "four",
    ]  # fmt: skip
    assert (int(dataset["two"]["row"]), int(dataset["three"]["row"])) == (1, 5)
    assert torch.equal(dataset["three"]["image"], dataset[4]["image"])
    with pytest.raises(
        SampleKeyError,
        match=r"has 2 samples 'same', of the shards s3://bucket/a\.tar, s3://bucket/b\.tar; say which: "
        r"dataset\.sample\('same', shard='s3://bucket/a\.tar'\)",
    ):
        dataset["same"]
    assert [int(dataset.sample("same", shard)["row"]) for shard in ("a.tar", "s3://bucket/b.tar")] == [3, 4]
    with pytest.raises(SampleKeyError, match=r"sample 'bad' failed: truncated \(shard s3://bucket/a\.tar\)"):
        dataset["bad"]
    for key, shard in (("five", None), ("one", "b.tar"), ("same", "tar")):
        with pytest.raises(SampleKeyError, match=f"has no sample '{key}'"):
            dataset.sample(key, shard)


def test_keys_are_read_a_part_at_a_time_and_only_some_are_remembered(tmp_path: Path) -> None:
    """All keys of a large store would take gigabytes in every process."""
    url, units = str(tmp_path), 3000
    create_store(url, dataclasses.replace(LAYOUT, rows=4 * units), IDENTITY)
    plan = plan_of(4 * units)
    names = [f"{row:06d}" for row in range(4 * units)]
    records = [SampleRecord(name, row, "ok") for row, name in enumerate(names)]
    receipts = [Receipt(plan.unit(unit), DIGEST, tuple(records[4 * unit : 4 * unit + 4])) for unit in range(units)]
    put_receipts(f"{url}/ledger", receipts)
    write_index(url, plan, Ledger(f"{url}/ledger"), {})
    declare_complete(url)
    keys = SampleKeys(url, store_attributes(url), remembered_bytes=150_000)  # of 72 kB a part
    assert keys._parts == {}, "nothing is read before the first key"
    os.rename(f"{url}/index/000002.parquet", f"{url}/index/away")
    assert [keys.key(row) for row in (0, 3999, 4000)] == [names[row] for row in (0, 3999, 4000)]
    assert list(keys._parts) == [0, 1]
    os.rename(f"{url}/index/away", f"{url}/index/000002.parquet")
    assert keys.key(8000) == names[8000]
    assert list(keys._parts) == [1, 2], "the part that was used longest ago is forgotten"
    assert len(pickle.dumps(keys)) < 2000
    assert [one.row for one in keys.find(names[11_999])] == [11_999]


def test_keys_of_a_store_that_is_not_complete_come_from_segments_as_well(tmp_path: Path) -> None:
    url, units = str(tmp_path), 1002
    create_store(url, dataclasses.replace(LAYOUT, rows=4 * units), IDENTITY)
    plan = plan_of(4 * units)
    storage.write_atomic(storage.join(url, "plan", "plan.json"), plan.to_json())
    records = [SampleRecord(f"k{row}", row, "ok") for row in range(4 * units)]
    receipts = [Receipt(plan.unit(unit), DIGEST, tuple(records[4 * unit : 4 * unit + 4])) for unit in range(units)]
    ledger = Ledger(f"{url}/ledger")
    put_receipts(ledger.url, receipts)
    keys = SampleKeys(url, store_attributes(url))
    assert keys.key(17) == "k17"
    assert ledger.compact(0)
    assert [keys.key(row) for row in (17, 3999, 4000, 4007)] == ["k17", "k3999", "k4000", "k4007"]
    assert [(one.row, one.shard) for key in ("k2000", "k4005") for one in keys.find(key)] == [
        (2000, "a.tar"), (4005, "a.tar"),
    ]  # fmt: skip
    os.remove(receipt_place(ledger.url, 1001))
    with pytest.raises(StoreError, match=r"000001001\.json is gone since .* was opened; open it again"):
        SampleKeys(url, store_attributes(url)).key(4004)


def test_samples_without_keys(store: tuple[str, Blocks]) -> None:
    assert set(FeatureDataset(store[0], keys=False)[0]) == {"features", "row"}


def test_what_a_dataset_is(store: tuple[str, Blocks], tmp_path: Path) -> None:
    url, _ = store
    assert repr(FeatureDataset(url)) == f"FeatureDataset({url}: 5 samples; features float32 [6, 10, 3])"
    names = ("features", "image", "seg", "depth", "cls", "valid")
    assert repr(FeatureDataset(url, names, window=(1, 2, 3, 4), dtype=torch.float16)) == (
        f"FeatureDataset({url}: 5 samples; features float16 [3, 4, 3]; image uint8 [3, 4, 3]; seg int64 [3, 4]; depth "
        "float32 [3, 4]; cls int64 []; valid bool [3, 4]; window (top, left, height, width) = (1, 2, 3, 4))"
    )
    create_store(str(tmp_path), LAYOUT, IDENTITY)
    text = repr(FeatureDataset(str(tmp_path), partial=True))
    assert text.endswith(": 0 samples; features float32 [6, 10, 3]; partial: its job has not ended)")


def negated(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"negative": -sample["features"], "row": sample["row"]}


def test_a_transform_is_called_with_each_sample(store: tuple[str, Blocks]) -> None:
    dataset = FeatureDataset(store[0], transform=negated)
    assert set(dataset[0]) == {"negative", "row"}
    assert torch.equal(dataset[3]["negative"], -FeatureDataset(store[0])[3]["features"])


def test_only_names_travel_to_a_worker(store: tuple[str, Blocks]) -> None:
    dataset = FeatureDataset(store[0], ALL, window=(1, 2, 3, 4), dtype=torch.float16, transform=negated)
    before = len(pickle.dumps(dataset))
    wanted = dataset[2]
    data = pickle.dumps(dataset)
    assert len(data) == before, "what was opened stays here"
    copy = pickle.loads(data)
    assert copy.rows.tolist() == GOOD
    assert torch.equal(copy[2]["negative"], wanted["negative"])
    assert torch.equal(dataset[2]["negative"], wanted["negative"]), "the original goes on"


def batches(dataset: FeatureDataset, context: str) -> list[dict[str, Any]]:
    return list(DataLoader(dataset, 2, num_workers=2, multiprocessing_context=context, timeout=100))


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_the_parent_reads(store: tuple[str, Blocks], context: str) -> None:
    dataset = FeatureDataset(store[0], ("features", "seg", "cls"), window=(1, 2, 5, 7))
    # Read here first: what the parent has opened must not be in a worker's way.
    wanted = [dataset[index] for index in range(len(GOOD))]
    found = batches(dataset, context)
    assert [len(batch["row"]) for batch in found] == [2, 2, 1]
    assert [batch["key"] for batch in found] == [["k0", "k2"], ["k3", "k4"], ["k5"]]
    for name in ("features", "seg", "cls", "row"):
        assert torch.equal(
            torch.cat([batch[name] for batch in found]), torch.stack([sample[name] for sample in wanted])
        )  # fmt: skip


SCRIPT = """
import multiprocessing, sys
from torch.utils.data import DataLoader
from pipeline.errors import ForkError
from pipeline.loader import FeatureDataset

def rows(dataset, context):
    loader = DataLoader(dataset, 2, num_workers=2, multiprocessing_context=context, timeout=60)
    return [row for batch in loader for row in batch["row"].tolist()]

def first_row(dataset):
    return dataset[0]["row"].item()

# Without a DataLoader, which takes 5 seconds to close each worker once one has raised.
def forked(dataset):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply_async(first_row, [dataset]).get(60)

if __name__ == "__main__":
    local, url = sys.argv[1:]
    used = FeatureDataset(url)
    used[0]
    for what, dataset in (("used", used), ("made since", FeatureDataset(url))):
        try:
            print(what, forked(dataset))
        except ForkError as error:
            print(what, "ForkError", " ".join(str(error).split()))
    print("used, spawn", rows(used, "spawn"))
    here = FeatureDataset(local)
    here.__getitems__([0, 1, 2])  # by threads
    print("local, fork", rows(here, "fork"))
"""


@pytest.mark.timeout(180)
def test_threads_that_do_not_survive_a_fork_are_refused_and_do_not_hang(
    store: tuple[str, Blocks], tmp_path: Path
) -> None:
    # In a process of its own, since it is marked for good by its first read of a remote store.
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), store[0], f"local://{store[0]}"], cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    for line, what in zip(lines[:2], ("used", "made since"), strict=True):
        assert line.startswith(f"{what} ForkError"), line
        assert re.search(
            r"process \d+ was forked from \d+, which had read a store through a remote file system: its threads", line
        )
        assert "Give the DataLoader multiprocessing_context='spawn' (or 'forkserver')" in line
    assert lines[2:] == [f"used, spawn {GOOD}", f"local, fork {GOOD}"]

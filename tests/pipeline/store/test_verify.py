"""Verification of a small store whose input is there; features are random, everything else is real."""

import dataclasses
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.compute.load import decode_options, load_unit
from pipeline.compute.source_check import check_source
from pipeline.config.base import Size, describe
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import StoreError
from pipeline.inputs.plan import Plan, plan_shard
from pipeline.store.create import create_store, declare_complete, withdraw_complete
from pipeline.store.index import write_index
from pipeline.store.layout import FAILED, NOTHING, OK, Layout, open_group, store_attributes
from pipeline.store.ledger import Ledger, Receipt
from pipeline.store.leftovers import find_leftovers, remove_leftovers
from pipeline.store.verification import Verification, repair_store, stored_plan, verify_store
from pipeline.store.verify import Finding, verify_unit
from pipeline.store.writer import StoreWriter, row_checksum

ROWS = 4
PCA = b"as if it were a PCA"


def write_tar(path: Path, samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (6, 10, 3), np.uint8)).save(picture, "PNG")
            # Its second sample cannot be decoded.
            image = picture.getvalue() if number != 1 else b"no picture"
            for name, data in ((f"s{number}.png", image), (f"s{number}.cls", str(number + seed).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_unit(out: str, plan: Plan, number: int, layout: Layout, config: PrecomputeConfig) -> Receipt:
    key = plan.unit(number)
    loaded = load_unit(plan, key, decode_options(config, (0.5, 0.5, 0.5)))
    status = np.full(ROWS, NOTHING, np.uint8)
    status[: len(key)] = [OK if record.status == "ok" else FAILED for record in loaded.records]
    features = np.random.default_rng(number).normal(size=(ROWS, 6, 10, 3)).astype(np.float16)
    features[status != OK] = np.nan
    blocks = {"features": features, "cls": loaded.blocks["cls"], "status": status}
    StoreWriter(out, layout).write(key, blocks)
    checksums = {
        name: [row_checksum(block[n : n + 1]) if status[n] == OK else None for n in range(len(key))]
        for name, block in blocks.items()
    }
    return Receipt(key, loaded.shard, loaded.records, checksums, seconds={"read": 1.0})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 6 and 3 samples, of which one each cannot be decoded, in three units."""
    folder = tmp_path_factory.mktemp("verify")
    out = str(folder / "out")
    for name, samples, seed in (("a", 6, 1), ("b", 3, 2)):
        write_tar(folder / f"{name}.tar", samples, seed)
    config = PrecomputeConfig(shards=(str(folder / "*.tar"),), out=out, size=Size(6, 10), labels=("cls",))
    index_dir = f"{out}/plan/index"
    plan = Plan(tuple(plan_shard(str(folder / name), index_dir) for name in ("a.tar", "b.tar")), ROWS, index_dir)
    layout = Layout(plan.rows, ROWS, 6, 10, 3, (6, 10), ("cls",), "uint8", False, 1)
    identity = {"pca digest": hashlib.sha256(PCA).hexdigest()}
    create_store(out, layout, {"identity": identity, "config": describe(config), "setup": {"mean": [0.5] * 3}})
    ledger = Ledger(f"{out}/ledger")
    (folder / "out/plan/plan.json").write_bytes(plan.to_json())
    (folder / "out/plan/pca.safetensors").write_bytes(PCA)
    for number in range(plan.units):
        ledger.commit(write_unit(out, plan, number, layout, config))
    write_index(out, plan, ledger, {})
    declare_complete(out)
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> str:
    """A copy of the store that a test may damage; the input stays where it is."""
    shutil.copytree(made / "out", tmp_path / "out")
    return str(tmp_path / "out")


def verify(out: str, source: Callable[..., Any] | None = check_source) -> Verification:
    """What ``pipeline.cluster.verify`` does, in this process."""
    plan = stored_plan(out)
    report = Verification(plan.units, plan.samples)
    done = Ledger(f"{out}/ledger").done()
    indexed = verify_store(out, plan, done, report)
    for unit in np.flatnonzero(done.mask(plan.units)).tolist():
        row = verify_unit(out, plan, unit, source, unit // 1000 in indexed).to_row()
        report.add(Finding.from_row(row))
    return report


def test_a_whole_store_is_clean(out: str) -> None:
    report = verify(out)
    assert report.text().splitlines() == [
        "clean: 3 units, 9 samples = 7 ok + 2 failed, 4.4 kB read, labels of 3 units compared with the input"
    ]
    assert report.clean


def rewrite(out: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the index and leave its metadata."""
    path = f"{out}/index/000000.parquet"
    table = pq.read_table(path)
    facts = pq.ParquetFile(path).metadata.metadata[b"featup"]
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(change(table))
        writer.add_key_value_metadata({"featup": facts})


def put(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


INDEX_DAMAGES: dict[str, list[Any]] = {
    "key": ["wrong"] * 9,
    "status": ["failed"] * 9,
    "reason": ["too_large"] * 9,
    "height": [7] * 9,
    "width": [None] * 9,
    "sha256": [b"x" * 32] * 9,
    "label_sha256": [[("cls", b"x" * 32)]] * 9,
    "shard": ["b.tar"] * 9,
    "unit": [0] * 9,
    "flags": ["odd"] * 9,
    "explained_variance": [0.5] * 9,
}


@pytest.mark.parametrize("name", INDEX_DAMAGES)
def test_an_index_that_says_something_else_than_the_receipts_is_found(out: str, name: str) -> None:
    # With every key and every status wrong it passed.
    rewrite(out, lambda table: put(table, name, INDEX_DAMAGES[name]))
    report = verify(out)
    assert not report.clean
    assert all(f": {name} is " in problem or "more differences" in problem for problem in report.problems)
    assert any("the receipt says" in problem for problem in report.problems)
    assert (report.damaged, report.misindexed) == ([], {0})


def test_an_outlier_flag_is_the_index_own(out: str) -> None:
    rewrite(out, lambda table: put(table, "flags", ["fit_outlier"] * 9))
    assert verify(out).clean


def test_rows_that_are_lost_or_moved_are_found(out: str) -> None:
    whole = Path(out, "index/000000.parquet").read_bytes()
    rewrite(out, lambda table: put(table, "row", [row + 1 for row in table["row"].to_pylist()]))
    assert not verify(out).clean
    Path(out, "index/000000.parquet").write_bytes(whole)
    rewrite(out, lambda table: table.slice(1))
    assert any("000000.parquet is missing or damaged" in problem for problem in verify(out).problems)
    for number, damage in ((0, b"PAR1"), (1, whole)):
        Path(out, f"index/{number:06d}.parquet").write_bytes(damage)
    problems = verify(out).problems
    assert len(problems) == 2
    assert "000000.parquet is missing or damaged" in problems[1]
    assert "000001.parquet is a part of the index beyond the plan's 3 units" in problems[0]


def test_a_receipt_of_other_samples_than_the_plan_is_found(out: str) -> None:
    ledger, plan = Ledger(f"{out}/ledger"), stored_plan(out)
    receipt = ledger.get(plan.unit(0), plan.shards[0].digest)
    assert receipt is not None
    samples = (dataclasses.replace(receipt.samples[0], key="other"), *receipt.samples[1:])
    ledger.commit(dataclasses.replace(receipt, samples=samples))
    report = verify(out, None)
    assert "the receipt lists other in row 0, the plan s0 in row 0" in report.problems[0]
    assert report.damaged == [0]


def flip(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 4
    Path(path).write_bytes(data)


@pytest.mark.parametrize("name", ["features/c/1/0/0/0", "cls/c/1", "status/c/1"])
def test_a_flipped_bit_is_found_set_back_and_mended(out: str, made: Path, name: str) -> None:
    flip(f"{out}/features.zarr/{name}")
    report = verify(out)
    assert report.damaged == [1]
    assert "unit 1 " in report.problems[0]
    repair_store(out, report)
    assert report.notes == [
        f"repair: 1 units set back (1), 0 parts of the index removed. The store is not complete until the job has run "
        f"again: python -m jobs.precompute --config {out}/plan/config.yaml"
    ]
    assert not store_attributes(out)["complete"]
    assert not os.path.exists(f"{out}/index/000000.parquet")
    again = verify(out)
    assert again.text().splitlines()[:-1] == [
        "not complete: the job has not ended, and the index was not compared; run the job again to finish the store",
        "1 of 3 units have no receipt: 1; run the job again to finish the store",
    ]
    # What the job then does.
    plan, ledger = stored_plan(out), Ledger(f"{out}/ledger")
    layout = Layout.from_dict(store_attributes(out)["layout"])
    config = PrecomputeConfig(shards=("a",), out=out, size=Size(6, 10), labels=("cls",))
    ledger.commit(write_unit(out, plan, 1, layout, config))
    write_index(out, plan, ledger, {})
    declare_complete(out)
    assert verify(out).clean
    for path in ("features.zarr/features/c/1/0/0/0", "index/000000.parquet", "features.zarr/zarr.json"):
        assert Path(out, path).read_bytes() == (made / "out" / path).read_bytes()


def test_a_damaged_receipt_is_set_back(out: str) -> None:
    Path(out, "ledger/000000/000000002.json").write_bytes(b"{")
    report = verify(out)
    assert report.damaged == [2]
    repair_store(out, report)
    assert Ledger(f"{out}/ledger").done() == {0, 1}


def test_a_wrong_index_is_removed_and_no_unit_computed_anew(out: str) -> None:
    rewrite(out, lambda table: put(table, "key", ["wrong"] * 9))
    report = verify(out)
    repair_store(out, report)
    assert "repair: 0 units set back (none), 1 parts of the index removed" in report.notes[0]
    assert Ledger(f"{out}/ledger").done() == {0, 1, 2}
    write_index(out, stored_plan(out), Ledger(f"{out}/ledger"), {})
    declare_complete(out)
    report = verify(out)
    assert report.clean
    repair_store(out, report)
    assert report.notes == ["nothing to repair"]
    assert store_attributes(out)["complete"]


def test_a_pca_that_was_replaced_is_found(out: str) -> None:
    Path(out, "plan/pca.safetensors").write_bytes(b"another")
    (problem,) = verify(out).problems
    wanted = (hashlib.sha256(b"another").hexdigest(), hashlib.sha256(PCA).hexdigest())
    assert f"has sha256 {wanted[0]}, and {out} was made with {wanted[1]}" in problem
    os.remove(f"{out}/plan/pca.safetensors")
    (problem,) = verify(out).problems
    assert "pca.safetensors is gone" in problem


def test_files_of_the_plan_have_recorded_digests(out: str) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    open_group(out, mode="r+").attrs["plan_files"] = {"backbone.safetensors": digest}
    Path(out, "plan/backbone.safetensors").write_bytes(b"weights")
    assert verify(out).clean
    Path(out, "plan/backbone.safetensors").write_bytes(b"other weights")
    assert digest in verify(out).problems[0]


def test_an_input_that_is_gone_is_no_problem_and_is_said(out: str, tmp_path: Path) -> None:
    # A store whose input was moved away could not be verified at all.
    gone = partial(check_source, url=str(tmp_path / "moved.tar"))
    report = verify(out, gone)
    assert report.clean
    lines = report.text().splitlines()
    assert lines[0].startswith("input not at hand: labels of 3 units not compared (")
    assert lines[1].endswith("labels of 0 units compared with the input")


def test_an_input_that_moved_is_compared_where_it_is(out: str, made: Path, tmp_path: Path) -> None:
    moved = shutil.copy(made / "a.tar", tmp_path / "moved.tar")
    plan = stored_plan(out)
    assert verify_unit(out, plan, 0, partial(check_source, url=str(moved))).compared
    other = verify_unit(out, plan, 2, partial(check_source, url=str(moved)))
    assert "moved.tar is not the shard that the store was made from" in other.problems[0]
    assert (other.damaged, other.misindexed) == (False, False)


def test_an_input_of_other_bytes_is_found_and_is_no_damage(out: str, made: Path, tmp_path: Path) -> None:
    # Written again with other labels of the same size, at the same time: only the bytes tell.
    path = tmp_path / "b.tar"
    data = (made / "b.tar").read_bytes()
    with tarfile.open(made / "b.tar") as tar:
        member = tar.getmember("s0.cls")
    path.write_bytes(data[: member.offset_data] + b"9" + data[member.offset_data + 1 :])
    finding = verify_unit(out, stored_plan(out), 2, partial(check_source, url=str(path)))
    (problem,) = finding.problems
    assert "row 8 (s0) was made from other bytes than the input holds now" in problem
    assert not finding.damaged, "set back and computed anew, the unit would mix two versions"


def test_units_without_a_receipt_are_one_line(out: str) -> None:
    withdraw_complete(out)
    for unit in (0, 2):
        os.remove(f"{out}/ledger/000000/{unit:09d}.json")
    report = verify(out)
    assert not report.clean
    assert "2 of 3 units have no receipt: 0, 2; run the job again to finish the store" in report.text().splitlines()
    report.missing = list(range(5000))
    assert "5000 of 3 units have no receipt: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ...; run" in report.text()


def test_leftover_files_are_found_anywhere(out: str, tmp_path: Path) -> None:
    places = [f"{out}/features.zarr/cls/c/.x.partial", f"{out}/ledger/000000/.y.partial", f"{out}/.z.partial"]
    for place in places:
        Path(place).write_bytes(b"")
    # In the store's own folder, where leases are renewed, a new file may be one that is being written.
    assert find_leftovers(out) == sorted(places[:2])
    os.utime(places[2], (0, 0))
    assert find_leftovers(out) == sorted(places)
    assert remove_leftovers(out) == sorted(places)
    assert find_leftovers(out) == []
    assert verify(out).clean


def test_no_store_says_so(out: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no feature store at .*none; give the folder that was --out"):
        stored_plan(str(tmp_path / "none"))
    Path(out, "plan/plan.json").write_bytes(b"{")
    with pytest.raises(StoreError, match=r"plan\.json is damaged"):
        stored_plan(out)

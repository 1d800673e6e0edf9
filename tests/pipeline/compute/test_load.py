"""Loading units: limits, hashes, changed input, and units that are done already."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.compute.load import LoadedUnit, load_row, load_sample, load_unit, unpack
from pipeline.compute.outcome import Outcome
from pipeline.decode.options import DecodeOptions
from pipeline.errors import EnvironmentFault, InputChangedError, InputError, Reason, SampleError, fault_of
from pipeline.inputs import storage
from pipeline.inputs.images import list_images
from pipeline.inputs.plan import Plan, plan_shard
from pipeline.inputs.tar import ShardIndex
from pipeline.options import Size
from pipeline.store.ledger import Ledger
from pipeline.store.receipt import Receipt, SampleRecord
from tests.pipeline.decode.pictures import FILES, many_scans, sample
from tests.pipeline.inputs.tars import tar_bytes

OPTIONS = DecodeOptions(Size(16, 24), labels=("seg", "cls"))
IMAGES = DecodeOptions(Size(16, 24))
MakePlan = Callable[..., Plan]


@pytest.fixture
def make_plan(tmp_path: Path) -> MakePlan:
    """A plan of one tar of these samples, three to a unit."""

    def make(*samples: dict[str, bytes]) -> Plan:
        files = [(f"{n:04d}.{ext}", data) for n, members in enumerate(samples) for ext, data in members.items()]
        (tmp_path / "a.tar").write_bytes(tar_bytes(files))
        index = str(tmp_path / "index")
        return Plan((plan_shard(str(tmp_path / "a.tar"), index),), 3, index)

    return make


def rewrite(plan: Plan) -> None:
    """The same tar with other bytes in its members, written later."""
    path = Path(plan.shards[0].url)
    path.write_bytes(path.read_bytes().replace(FILES["png"][-40:], bytes(40)))
    os.utime(path, ns=(0, int(plan.shards[0].stamp) + 10**9))


def loaded_row(plan: Plan, out: Path, options: DecodeOptions = OPTIONS) -> LoadedUnit | Outcome:
    """Unit 0 through a row as Ray hands it on."""
    reference = (plan, np.array([0]), options, str(out))
    row = load_row({"id": 0}, lambda _: reference, "its name")
    batch: dict[str, Any] = {name: np.asarray([value]) for name, value in row.items() if name != "meta"}
    ((key, loaded),) = unpack(batch | {"meta": [row["meta"]]})
    assert key == plan.unit(0)
    return loaded


def test_a_unit_survives_its_row(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(sample(), sample() | {"seg.png": b""}, sample())
    expected, loaded = load_unit(plan, plan.unit(0), OPTIONS), loaded_row(plan, tmp_path)
    assert isinstance(loaded, LoadedUnit)
    assert loaded.records == expected.records
    assert [record.status for record in loaded.records] == ["ok", "failed", "ok"]
    assert (loaded.shard, loaded.sizes) == (expected.shard, expected.sizes)
    for name, block in expected.blocks.items():
        np.testing.assert_array_equal(loaded.blocks[name], block)


def test_a_member_with_too_many_bytes_is_not_read(make_plan: MakePlan) -> None:
    large = sample() | {"jpg": sample()["jpg"] + bytes(50_000)}
    other = sample() | {"json": bytes(50_000), "png": bytes(50_000)}  # no member that is decoded
    plan = make_plan(sample(), large, other)
    options = replace(OPTIONS, max_bytes=50_000)
    loaded = load_unit(plan, plan.unit(0), options)
    assert [record.status for record in loaded.records] == ["ok", "failed", "ok"]
    record, size = loaded.records[1], len(large["jpg"])
    assert record.reason == Reason.TOO_MANY_BYTES
    assert f"jpg has {size} bytes, more than max_bytes = 50000, and is not read; raise max_bytes" in record.detail
    assert record.sha256 == ""
    assert loaded.sizes["read"] == 2 * sum(len(sample()[ext]) for ext in ("jpg", "seg.png", "cls"))
    with pytest.raises(SampleError, match="more than max_bytes"):
        load_sample(plan.index(0), 1, options)
    assert load_sample(plan.index(0), 1, replace(options, max_bytes=size)).labels["cls"] == 3


def test_the_bytes_of_a_cell_count_and_not_their_estimate(tmp_path: Path) -> None:
    """All rows failed as too_many_bytes where another column, or another row's image, was heavy."""
    jpg = sample()["jpg"]
    limit = len(jpg) + 1000
    large = jpg + bytes(9 * limit)
    table = pa.table({"image": [jpg, large, jpg], "sound": [bytes(9 * limit)] * 3})
    pq.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    images = list_images([str(tmp_path / "t.parquet")], ("jpg",), {}, {})
    index = ShardIndex("", 0, "", tuple(images.samples), ())
    options = replace(IMAGES, max_bytes=limit)
    for row in (0, 2):
        assert load_sample(index, row, options).image.any()
    with pytest.raises(
        SampleError, match=rf"too_many_bytes: jpg has {len(large)} bytes, more than max_bytes = {limit}"
    ):
        load_sample(index, 1, options)


def test_scan_bombs_fail_alone_and_soon(make_plan: MakePlan) -> None:
    """Nothing was stored in 300 s: libjpeg-turbo #284, DALI #5316."""
    good = {"jpg": FILES["jpeg"]}
    plan = make_plan(good, {"jpg": many_scans(30_000, 9800)}, good, {"jpg": many_scans(900, 7000)}, good)
    options = replace(IMAGES, decode_timeout=1.0)
    started = time.monotonic()
    records = [record for number in (0, 1) for record in load_unit(plan, plan.unit(number), options).records]
    assert time.monotonic() - started < 30
    assert [record.reason for record in records] == ["", "too_large", "", "decode_timeout", ""]
    assert "decode_timeout = 1 s" in records[3].detail


def test_failed_samples_have_the_hashes_of_their_bytes(make_plan: MakePlan) -> None:
    """Without them a changed input goes unnoticed where samples failed."""
    broken = sample() | {"jpg": b"no image"}
    unlabelled = {"jpg": FILES["jpeg"]}
    plan = make_plan(sample(), broken, unlabelled)
    records = load_unit(plan, plan.unit(0), OPTIONS).records
    assert [record.reason for record in records] == ["", "undecodable", "label_missing"]
    for record, members in zip(records, (sample(), broken, unlabelled), strict=True):
        digests = {ext: hashlib.sha256(data).hexdigest() for ext, data in members.items()}
        assert record.sha256 == digests["jpg"]
        labels = {"seg": "seg.png", "cls": "cls"}
        assert record.label_sha256 == {kind: digests[ext] for kind, ext in labels.items() if ext in members}


def test_a_unit_with_a_receipt_is_not_read(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(sample())
    records = (SampleRecord("0000", 0, "ok"),)
    receipt = Receipt(plan.unit(0), plan.shards[0].digest, records, worker={"host": "another"})
    Ledger(storage.join(str(tmp_path), "ledger")).commit(receipt)
    Path(plan.shards[0].url).unlink()
    assert loaded_row(plan, tmp_path) == Outcome(receipt)


def test_a_damaged_receipt_fails_its_unit_alone(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(sample())
    ledger = Ledger(storage.join(str(tmp_path), "ledger"))
    ledger.commit(Receipt(plan.unit(0), plan.shards[0].digest, (SampleRecord("0000", 0, "ok"),)))
    (name,) = storage.list_files(ledger.url)
    Path(ledger.url, name).write_bytes(b"{")
    outcome = loaded_row(plan, tmp_path)
    assert isinstance(outcome, Outcome)
    assert outcome.fault == "unit"
    assert outcome.receipt.error.startswith("DamagedReceiptError: ")
    (record,) = outcome.receipt.samples
    assert (record.key, record.status, record.reason) == ("0000", "failed", "unit_failed")


def test_input_that_changed_is_told_apart(make_plan: MakePlan, tmp_path: Path) -> None:
    """A tar rewritten with the same size in mid-run was mixed into the store."""
    plan = make_plan({"png": FILES["png"]})
    rewrite(plan)
    with pytest.raises(InputChangedError, match=r"a\.tar changed while the job ran"):
        load_unit(plan, plan.unit(0), IMAGES)
    outcome = loaded_row(plan, tmp_path, IMAGES)
    assert isinstance(outcome, Outcome)
    assert outcome.fault == "input"
    assert outcome.receipt.error.startswith("InputChangedError: ")


def test_input_that_changes_while_it_is_read_is_noticed(make_plan: MakePlan) -> None:
    plan = make_plan({"png": FILES["png"]})

    def read(url: str, start: int, stop: int) -> bytes:
        data = storage.read_range(url, start, stop)
        rewrite(plan)
        return data

    assert load_unit(plan, plan.unit(0), IMAGES).records[0].status == "ok"
    with pytest.raises(InputChangedError, match="changed while the job ran"):
        load_unit(plan, plan.unit(0), IMAGES, read=read)


def test_faults() -> None:
    assert fault_of(InputChangedError("a.tar")) == "input"
    assert fault_of(EnvironmentFault("disk full")) == "environment"
    assert fault_of(InputError("no such tar")) == fault_of(OSError(5, "reset")) == "unit"


def test_loading_imports_neither_torch_nor_ray() -> None:
    """Processes that load start fast and stay small."""
    script = "import sys, pipeline.compute.load; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=60, check=True)
    assert set(done.stdout.decode().split()).isdisjoint({"torch", "ray", "timm"})


def test_a_label_that_is_missing_is_its_unknown_value_where_it_may_be(make_plan: MakePlan) -> None:
    plan = make_plan(sample(), {"jpg": FILES["jpeg"]})
    loaded = load_unit(plan, plan.unit(0), replace(OPTIONS, missing_label="keep"))
    assert [record.status for record in loaded.records] == ["ok", "ok"]
    assert {"no_seg", "no_cls"} <= set(loaded.records[1].flags)
    assert not loaded.records[0].flags
    assert (loaded.blocks["seg"][1] == 255).all()
    assert loaded.blocks["cls"].tolist()[:2] == [3, -1]

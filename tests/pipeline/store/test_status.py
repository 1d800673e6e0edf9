import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.status import main
from pipeline.errors import StoreError, StoreFormatError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard
from pipeline.store.create import create_store, declare_complete
from pipeline.store.index import write_index
from pipeline.store.layout import Layout
from pipeline.store.lease import Lease
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
from pipeline.store.segments import receipt_place
from pipeline.store.status import UnitStatus, collect_status, list_failed, list_units
from pipeline.store.status_text import status_text
from tests.pipeline.store.support import DIGEST, put_receipts

ROWS = 4
START = time.time() - 100_000


@pytest.fixture(params=["path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "path" else f"memory://test_status{tmp_path}"


def make_store(url: str, units: int, rest: int = 2) -> Plan:
    """A store and its plan: units of four samples, the last one of ``rest``."""
    samples = (units - 1) * ROWS + rest
    shards = (PlannedShard("s3://key:secret@bucket/a.tar", 1, "", samples, samples, ("ends early",), DIGEST),)
    plan = Plan(shards, ROWS, "")
    layout = Layout(units * ROWS, ROWS, 2, 2, 1, (2, 2), (), "uint8", False, 1)
    create_store(url, layout, {"identity": {}})
    storage.write_atomic(storage.join(url, "plan", "plan.json"), plan.to_json())
    return plan


def receipt_of(plan: Plan, unit: int, failed: Sequence[str] = (), seconds: float = 1.0, **other: Any) -> Receipt:
    """The receipt of a unit whose first samples failed for the reasons ``failed``, done at ten seconds a unit."""
    key = plan.unit(unit)
    records = []
    for place in range(len(key)):
        reason = failed[place] if place < len(failed) else ""
        detail = f"detail\nof {place}" if reason else ""
        records.append(
            SampleRecord(f"k{key.row + place}", key.row + place, "failed" if reason else "ok", reason, detail)
        )
    worker = {"host": "far", "pid": 7, "finished": START + 10.0 * unit}
    return Receipt(
        key, DIGEST, tuple(records), seconds={"read": seconds, "features": 2 * seconds}, worker=worker, **other
    )


def ledger_of(url: str) -> Ledger:
    return Ledger(storage.join(url, "ledger"))


def test_nothing_was_started(url: str) -> None:
    status = collect_status(url)
    assert (status.state, status.units, status.units_done, status.holder) == ("not started", None, 0, None)
    assert status_text(status) == f"{url}: not started\nlease     held by nobody"
    assert list(list_failed(url)) == []
    with pytest.raises(StoreError, match=r"has no plan/plan\.json: no job has planned it yet"):
        list(list_units(url))


def test_job_that_plans_is_running(url: str) -> None:
    with Lease.acquire(url):
        assert collect_status(url).state == "running"


def test_running_job(url: str) -> None:
    plan = make_store(url, 12)
    ledger = ledger_of(url)
    for unit in range(5):
        ledger.commit(receipt_of(plan, unit, ["undecodable"] if unit == 1 else [], seconds=1.0 + unit))
    ledger.begin_attempt(5, 0)
    # A driver whose clock stood at the first unit's end: what runs before it did does not count.
    with Lease.acquire(url, clock=lambda: START) as lease:
        status = collect_status(url, clock=lambda: START + 45)
        assert status.state == "running"
        assert (status.units, status.units_done, status.units_failed, status.units_left) == (12, 5, 0, 7)
        assert status.units_begun == 1
        assert (status.samples, status.ok, status.failed, status.samples_left) == (46, 19, 1, 26)
        assert status.reasons == {"undecodable": 1}
        # Sixteen samples after the first unit in four times ten seconds.
        assert (status.rate, status.rate_units) == (pytest.approx(0.4), 5)
        assert status.seconds_left == pytest.approx(26 / 0.4)
        assert status.finished == pytest.approx(START + 40)
        assert [unit.unit for unit in status.slowest] == [4, 3, 2, 1, 0]
        assert status.slowest[0].seconds == {"read": 5.0, "features": 10.0}
        assert status.holder == lease.info
        assert status.heartbeat_age == pytest.approx(45)
        lines = status_text(status, START + 45).splitlines()
    assert lines[:5] == [
        f"{url}: running",
        "units     5 of 12 done, 7 left, 1 of them begun",
        "samples   46 = 19 ok + 1 failed + 26 left",
        "failed    1  undecodable",
        "input     s3://bucket/a.tar: ends early",
    ]
    assert "rate      0.4 samples/s over the last 5 units, about 1 min 05 s left" in lines
    assert "last      unit done 5 s ago" in lines
    assert "slow      unit 4: done, 4 samples, 15.0 s (read 5.0, features 10.0), pid 7 on far" in lines
    assert lines[-1].startswith(f"lease     pid {os.getpid()} of ")
    assert ", last heartbeat 45 s ago: " in lines[-1]


def test_rate_is_that_of_this_run_and_of_the_last_minutes(url: str) -> None:
    plan = make_store(url, 400)
    put_receipts(storage.join(url, "ledger"), [receipt_of(plan, unit) for unit in range(300)])
    status = collect_status(url)
    assert (status.rate, status.rate_units) == (pytest.approx(0.4), 60)
    with Lease.acquire(url, clock=lambda: START + 2900):
        status = collect_status(url, clock=lambda: START + 2990)
    assert status.state == "stopped"
    with Lease.acquire(url, clock=lambda: START + 2950):
        status = collect_status(url, clock=lambda: START + 2990)
    assert (status.state, status.rate_units) == ("running", 5)


def test_stopped_job_and_the_lease_it_left_behind(url: str) -> None:
    plan = make_store(url, 3)
    ledger_of(url).commit(receipt_of(plan, 0))
    assert collect_status(url).state == "stopped"
    lease = Lease.acquire(url, clock=lambda: START)
    status = collect_status(url, clock=lambda: START + 61)
    assert (status.state, status.holder_lives) == ("stopped", False)
    assert status.seconds_left is None
    text = status_text(status, START + 61)
    assert f"lease     left behind by pid {os.getpid()} of " in text
    assert "last heartbeat 1 min 01 s ago: the next run takes it over" in text
    lease.release()


def test_complete_store(url: str) -> None:
    plan = make_store(url, 3)
    ledger = ledger_of(url)
    for unit in range(3):
        ledger.commit(receipt_of(plan, unit, ["truncated", "undecodable"] if unit == 2 else []))
    write_index(url, plan, ledger, {})
    declare_complete(url)
    status = collect_status(url)
    assert (status.state, status.units_done, status.units_left) == ("complete", 3, 0)
    assert (status.ok, status.failed, status.samples_left) == (8, 2, 0)
    assert status.reasons == {"truncated": 1, "undecodable": 1}
    assert status.timed_units == 3
    assert [sample.key for sample in list_failed(url)] == ["k8", "k9"]
    (sample,) = list_failed(url, ["undecodable"])
    assert (sample.shard, sample.unit, sample.row, sample.detail) == ("s3://bucket/a.tar", 2, 9, "detail\nof 1")


def test_units_that_failed_for_good(url: str) -> None:
    plan = make_store(url, 4)
    ledger = ledger_of(url)
    ledger.commit(receipt_of(plan, 0, ["truncated"]))
    ledger.commit(receipt_of(plan, 2))
    failures = {unit: receipt_of(plan, unit, ["unit_failed"] * 4, error="disk on fire") for unit in (1, 3)}
    write_index(url, plan, ledger, failures)
    status = collect_status(url)
    assert (status.state, status.units_done, status.units_failed, status.units_left) == ("stopped", 2, 2, 0)
    assert (status.ok, status.failed, status.samples_left) == (7, 7, 0)
    assert status.reasons == {"unit_failed": 6, "truncated": 1}
    assert "2 of 4 done, 2 failed for good (the same command tries them again), 0 left" in status_text(status)
    assert [sample.row for sample in list_failed(url)] == [0, 4, 5, 6, 7, 12, 13]
    assert [unit.state for unit in list_units(url)] == ["done", "failed", "done", "failed"]
    # Tried again, and well: the index that lists it as failed is of the run before.
    ledger.commit(receipt_of(plan, 1))
    status = collect_status(url)
    assert (status.units_done, status.units_failed) == (3, 1)
    assert (status.ok, status.failed) == (11, 3)
    assert [sample.row for sample in list_failed(url)] == [0, 12, 13]


def test_damaged_receipt_is_reported_and_the_others_count(url: str) -> None:
    plan = make_store(url, 3)
    ledger = ledger_of(url)
    ledger.commit(receipt_of(plan, 0))
    ledger.commit(receipt_of(plan, 1))
    storage.write_atomic(receipt_place(ledger.url, 1), b"{")
    status = collect_status(url)
    assert (status.units_done, status.ok, status.samples_left) == (2, 4, 6)
    (error,) = status.damaged
    assert "000000001.json is no receipt" in error
    assert f"damaged   {error}" in status_text(status)
    assert [unit.state for unit in list_units(url)] == ["done", "damaged", "left"]


def test_damaged_segment_is_reported_and_the_others_count(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    plan = make_store(url, 1500)
    ledger = ledger_of(url)
    put_receipts(ledger.url, [receipt_of(plan, unit) for unit in range(1001)])
    ledger.compact(0)
    (tmp_path / "out" / "ledger" / "segments" / "000000.parquet").write_bytes(b"PAR1")
    status = collect_status(url)
    assert (status.units_done, status.ok) == (1001, 4)
    (error,) = status.damaged
    assert "000000.parquet cannot be read as parquet" in error
    assert list(list_failed(url)) == []
    assert [unit.state for unit in list_units(url)] == ["damaged"] * 1000 + ["done"] + ["left"] * 499


def test_missing_plan_is_reported(url: str) -> None:
    plan = make_store(url, 3)
    ledger_of(url).commit(receipt_of(plan, 0))
    storage.remove(storage.join(url, "plan", "plan.json"))
    status = collect_status(url)
    assert (status.state, status.units, status.units_done) == ("stopped", None, 1)
    assert "1 done; how many there are is not known: plan/plan.json is missing" in status_text(status)


def test_store_of_before_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    make_store(url, 1)
    place = tmp_path / "out" / "features.zarr" / "zarr.json"
    place.write_text(place.read_text().replace('"featup-store"', '"featup-datasets/1"'))
    with pytest.raises(StoreFormatError, match="was made before format"):
        collect_status(url)
    assert main([url]) == 1


@pytest.fixture(scope="module")
def compacted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Plan]:
    """A store of 2100 units, of which the first thousand are in a segment and 25 more are done."""
    url = str(tmp_path_factory.mktemp("compacted") / "out")
    plan = make_store(url, 2100)
    ledger = ledger_of(url)
    units = [*range(1000), *range(1010, 1035)]
    put_receipts(ledger.url, [receipt_of(plan, unit, ["truncated"] if unit % 100 == 10 else []) for unit in units])
    assert ledger.compact(0)
    return url, plan


def test_compacted_units_count_before_there_is_an_index(compacted: tuple[str, Plan]) -> None:
    url, _ = compacted
    status = collect_status(url)
    assert (status.units_done, status.units_left) == (1025, 1075)
    assert (status.ok, status.failed, status.samples) == (4100 - 11, 11, 8398)
    assert (status.reasons, status.unread_reasons) == ({"truncated": 11}, 0)
    assert [sample.unit for sample in list_failed(url)] == [*range(10, 1000, 100), 1010]
    states = [unit.state for unit in list_units(url)]
    assert states == ["done"] * 1000 + ["left"] * 10 + ["done"] * 25 + ["left"] * 1065


def test_compacted_units_count_by_the_index(compacted: tuple[str, Plan]) -> None:
    url, plan = compacted
    before = collect_status(url)
    rest = {unit: receipt_of(plan, unit, ["unit_failed"] * 4, error="x") for unit in range(1000, 2100)}
    write_index(url, plan, ledger_of(url), rest)
    status = collect_status(url)
    assert status.units_failed == 1075
    assert status.ok == before.ok
    assert status.failed == before.failed + before.samples_left
    assert status.reasons == {"unit_failed": before.samples_left, "truncated": 11}
    # The segment's own counts are not read any more: its partition has them.
    os.remove(os.path.join(url, "ledger", "segments", "000000.parquet"))
    open(os.path.join(url, "ledger", "segments", "000000.parquet"), "w").close()
    assert collect_status(url).ok == before.ok


def test_times_of_a_store_whose_units_are_all_compacted(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    plan = make_store(url, 1000)
    put_receipts(storage.join(url, "ledger"), [receipt_of(plan, unit) for unit in range(1000)])
    ledger_of(url).compact(0)
    status = collect_status(url)
    assert (status.timed_units, status.rate) == (1000, pytest.approx(0.4 - 0.4 / 59 / 2, abs=0.01))


def test_command_prints_text_json_and_lists(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_store(url, 3)
    ledger_of(url).commit(receipt_of(plan, 0, ["truncated", "undecodable"]))
    assert main([url]) == 0
    assert capsys.readouterr().out.startswith(f"{url}: stopped\nunits     1 of 3 done, 2 left\n")
    assert main([url, "--failed", "--units"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "k0\ts3://bucket/a.tar\ttruncated\tdetail of 0" in lines
    assert lines[-3:] == [
        "unit 0: done, 4 samples, 2 failed, 3.0 s (read 1.0, features 2.0), pid 7 on far",
        "unit 1: left, 4 samples",
        "unit 2: left, 2 samples",
    ]
    assert main([url, "--json", "--failed", "undecodable", "--units"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["state"] == "stopped"
    assert content["reasons"] == {"truncated": 1, "undecodable": 1}
    assert [sample["key"] for sample in content["failed_samples"]] == ["k1"]
    assert [unit["state"] for unit in content["unit_list"]] == ["done", "left", "left"]
    with pytest.raises(SystemExit):
        main([url, "--failed", "no_such_reason"])
    assert "invalid choice: 'no_such_reason'" in capsys.readouterr().err


def test_command_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from jobs.status import main\n"
        "assert main([sys.argv[1]]) == 0\n"
        "print(sorted({'ray', 'torch', 'timm', 'PIL', 'jsonargparse'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    make_store(url, 50_000)
    run = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m jobs.status {url} --units | head -n 1"], capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == (f"{url}: stopped\n", "")


def test_unit_status_adds_stages() -> None:
    unit = UnitStatus(0, "done", 4, seconds={"read": 1.5, "decode": 2.0})
    assert unit.total_seconds == 3.5
    assert dataclasses.replace(unit, seconds={}).total_seconds == 0

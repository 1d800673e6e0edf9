import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import Reason, StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard
from pipeline.store.index import Summary, index_table, read_index, write_index
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
from pipeline.store.partitions import PartitionFacts
from tests.pipeline.store.support import DIGEST, put_receipts

FAULT = "cut off after 812 bytes"
PLAN = Plan(
    (
        PlannedShard("s3://b/a.tar", 1000, "t", 5, 5, (), "d"),
        PlannedShard("s3://b/b.tar", 10, "t", 0, 0, (FAULT,), "d"),
        PlannedShard("s3://b/c.tar", 1000, "t", 9, 3, (), "d"),
    ),
    rows_per_shard=4,
    index_dir="",
)


def receipt_of(number: int, failed: dict[int, Reason] | None = None, plan: Plan = PLAN, error: str = "") -> Receipt:
    """The receipt of a unit, with failures by their place in it."""
    key = plan.unit(number)
    records = [
        SampleRecord(
            f"k{place}", key.row + place, "failed" if place in (failed or {}) else "ok",
            reason=(failed or {}).get(place, ""), source_size=(480, 640),
            sha256=hashlib.sha256(f"{number} {place}".encode()).hexdigest(),
        )
        for place in range(len(key))
    ]  # fmt: skip
    seconds, sizes = {"read": 0.5, "features": 1.5}, {"read": 1000, "encode_write": 5000, "stored": 300}
    return Receipt(key, "d", tuple(records), seconds=seconds, sizes=sizes, error=error)


@pytest.fixture(params=["path", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "path" else f"memory://test_index{tmp_path}"


def commit(out: str, *receipts: Receipt) -> Ledger:
    ledger = Ledger(storage.join(out, "ledger"))
    for receipt in receipts:
        ledger.commit(receipt)
    return ledger


def test_every_sample_has_its_row(out: str) -> None:
    ledger = commit(out, receipt_of(2), receipt_of(0, {1: Reason.UNDECODABLE}), receipt_of(1, {0: Reason.TOO_LARGE}))
    summary = write_index(out, PLAN, ledger, {})
    table = read_index(out)
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4, 8, 9, 10]
    assert table["key"].to_pylist() == ["k0", "k1", "k2", "k3", "k0", "k0", "k1", "k2"]
    assert table["unit"].to_pylist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert table["shard"].to_pylist() == ["s3://b/a.tar"] * 5 + ["s3://b/c.tar"] * 3
    assert table["status"].to_pylist() == ["ok", "failed", "ok", "ok", "failed", "ok", "ok", "ok"]
    assert table["reason"].to_pylist() == ["", "undecodable", "", "", "too_large", "", "", ""]
    assert (summary.units, summary.samples, summary.ok, summary.failed) == (3, 8, 6, 2)
    assert summary.samples == summary.ok + summary.failed == PLAN.samples
    assert summary.reasons == {"undecodable": 1, "too_large": 1}
    assert summary.faults == [f"s3://b/b.tar: {FAULT}"]
    assert summary.failed_units == []


def test_all_that_is_known_of_a_sample_is_kept(out: str) -> None:
    plan = Plan((PlannedShard("a.tar", 1, "", 2, 2, (), "d"),), 2, "")
    full = SampleRecord(
        "schlüssel/0", 0, "failed", "undecodable", "broken at byte 7", (480, 640), {"kind": "pad", "box": [1, 2]},
        ("exif", "alpha"), 6, "pillow", "ab" * 32, {"seg": "cd" * 32, "cls": "ef" * 32}, 0.5,
    )  # fmt: skip
    ledger = commit(out, Receipt(plan.unit(0), "d", (full, SampleRecord("k1", 1, "ok"))))
    write_index(out, plan, ledger, {})
    first, second = read_index(out).to_pylist()
    assert json.loads(first.pop("transform")) == full.transform
    assert first == {
        "row": 0, "key": "schlüssel/0", "shard": "a.tar", "unit": 0, "status": "failed", "reason": "undecodable",
        "detail": "broken at byte 7", "height": 480, "width": 640, "flags": "exif alpha", "orientation": 6,
        "decoder": "pillow", "sha256": b"\xab" * 32, "explained_variance": 0.5,
        "label_sha256": [("seg", b"\xcd" * 32), ("cls", b"\xef" * 32)],
    }  # fmt: skip
    assert (second["height"], second["width"], second["transform"], second["flags"]) == (None, None, "", "")
    assert (second["sha256"], second["label_sha256"]) == (None, [])
    assert read_index(out, ["key", "status"]).column_names == ["key", "status"]


@pytest.mark.parametrize(
    ("explained", "outliers"),
    [
        ([0.5, 0.52, 0.48, 0.51, None, 0.1, 0.49, 0.95], [5]),
        # Seen on eight street scenes, three of which were flagged.
        ([0.809, 0.788, 0.808, 0.799, 0.808, 0.808, 0.81, 0.799], []),
        ([0.808, 0.808, None, 0.808, 0.808, 0.74, 0.808, 0.808], [5]),
    ],
    ids=["spread", "alike", "alike-but-one"],
)
def test_fits_far_below_the_others_are_flagged(out: str, explained: list[float | None], outliers: list[int]) -> None:
    plan = Plan((PlannedShard("a.tar", 1, "", len(explained), len(explained), (), "d"),), len(explained), "")
    records = tuple(
        SampleRecord(f"k{row}", row, "ok", flags=("exif",), explained_variance=value)
        for row, value in enumerate(explained)
    )
    write_index(out, plan, commit(out, Receipt(plan.unit(0), "d", records)), {})
    found = read_index(out)
    flags = found["flags"].to_pylist()
    assert [row for row, one in enumerate(flags) if "fit_outlier" in one] == outliers
    assert all(flags[row] == "exif fit_outlier" for row in outliers)
    assert found["explained_variance"].to_pylist() == pytest.approx(explained)


def test_units_that_failed_are_listed_with_their_samples(out: str) -> None:
    failed = receipt_of(0, dict.fromkeys(range(4), Reason.UNIT_FAILED), error="out of memory")
    ledger = commit(out, receipt_of(1), receipt_of(2))
    summary = write_index(out, PLAN, ledger, {0: failed})
    assert summary.failed_units == [0]
    assert (summary.ok, summary.failed, summary.samples) == (4, 4, 8)
    assert read_index(out)["reason"].to_pylist()[:5] == ["unit_failed"] * 4 + [""]
    lines = summary.text().splitlines()
    assert "units failed for good: 1 of 3" in lines
    assert lines[-1] == "input 8 = ok 4 + failed 4"
    # What another run has done since counts for more than that this one failed.
    since = write_index(out, PLAN, commit(out, receipt_of(0)), {0: failed})
    assert (since.failed_units, since.ok, since.failed) == ([], 8, 0)


def test_a_unit_without_receipt_is_refused(out: str) -> None:
    ledger = commit(out, receipt_of(0), receipt_of(2))
    text = r"unit 1 \(shard 0, samples 4:5, row 4\) has no receipt, so not every sample is accounted for; run the job"
    with pytest.raises(StoreError, match=text):
        write_index(out, PLAN, ledger, {})
    with pytest.raises(StoreError, match=f"{out} has no index: the job that makes the store has not ended"):
        read_index(out)


def test_a_receipt_that_lacks_a_sample_is_refused(out: str) -> None:
    whole = receipt_of(0)
    ledger = commit(out, dataclasses.replace(whole, samples=whole.samples[:3]), receipt_of(1), receipt_of(2))
    with pytest.raises(StoreError, match=r"unit 0 .* has 3 samples in its receipt, so not every sample is accounted"):
        write_index(out, PLAN, ledger, {})


def test_a_receipt_of_another_plan_is_refused(out: str) -> None:
    ledger = commit(out, dataclasses.replace(receipt_of(0), shard="e"), receipt_of(1), receipt_of(2))
    with pytest.raises(StoreError, match=r"receipt of unit 0 .* of input e, expected unit 0"):
        write_index(out, PLAN, ledger, {})


def test_an_index_that_cannot_be_made_leaves_the_old_one(out: str) -> None:
    ledger = commit(out, receipt_of(0), receipt_of(1), receipt_of(2))
    write_index(out, PLAN, ledger, {})
    before = read_index(out)
    storage.remove(storage.join(ledger.url, "000000/000000002.json"))
    with pytest.raises(StoreError, match="no receipt"):
        write_index(out, PLAN, ledger, {})
    assert read_index(out) == before


def test_more_samples_than_are_gathered_at_once(tmp_path: Path) -> None:
    plan = Plan(tuple(PlannedShard(f"{n}.tar", 1, "", 26_000, 26_000, (), "d") for n in range(4)), 26_000, "")
    reasons = list(Reason)[:4]
    ledger = commit(str(tmp_path), *[receipt_of(n, {n: reason}, plan) for n, reason in enumerate(reasons)])
    summary = write_index(str(tmp_path), plan, ledger, {})
    assert (summary.ok, summary.failed) == (103_996, 4)
    table = read_index(str(tmp_path))
    assert table["row"].to_pylist() == list(range(104_000))
    failed = [row for row in table.select(["shard", "status", "reason"]).to_pylist() if row["status"] == "failed"]
    assert [(row["shard"], row["reason"]) for row in failed] == [(f"{n}.tar", r.value) for n, r in enumerate(reasons)]


def facts_of(*receipts: Receipt) -> PartitionFacts:
    facts = PartitionFacts("", False)
    facts.bytes = {"read": 1000 * len(receipts), "encode_write": 5000 * len(receipts), "stored": 300 * len(receipts)}
    facts.seconds = {"read": 0.5 * len(receipts), "features": 1.5 * len(receipts)}
    facts.count(index_table(receipts, PLAN))
    return facts


def test_the_summary_of_a_run() -> None:
    summary = Summary(units=3, faults=["s3://b/b.tar: gone"])
    first = receipt_of(0, {0: Reason.UNDECODABLE, 1: Reason.UNDECODABLE, 2: Reason.TOO_LARGE})
    summary.add(facts_of(first))
    summary.add(facts_of(receipt_of(1)))
    assert summary.text().splitlines() == [
        "per sample: read 500.0 ms, features 1500.0 ms",
        "bytes: 2.0 kB read, 10.0 kB of arrays, 600 B stored",
        "input fault: s3://b/b.tar: gone",
        "failed:      2  undecodable",
        "failed:      1  too_large",
        "input 5 = ok 2 + failed 3",
    ]
    nothing = Summary()
    nothing.add(facts_of(receipt_of(1, {0: Reason.TRUNCATED})))
    assert nothing.text().splitlines() == ["failed:      1  truncated", "input 1 = ok 0 + failed 1"]


def test_stages_are_summed_over_all_units(out: str) -> None:
    summary = write_index(out, PLAN, commit(out, receipt_of(0), receipt_of(1), receipt_of(2)), {})
    assert summary.seconds == {"read": 1.5, "features": 4.5}
    assert summary.bytes == {"read": 3000, "encode_write": 15000, "stored": 900}


BIG = Plan((PlannedShard("https://user:secret@host/a.tar?signature=1", 1, "", 2005, 2005, (), DIGEST),), 1, "")


def big_receipts(units: Iterable[int], seconds: float = 0.0, explained: float | None = None) -> Iterator[Receipt]:
    for unit in units:
        record = SampleRecord(f"k{unit}", unit, "ok", explained_variance=explained)
        yield Receipt(BIG.unit(unit), DIGEST, (record,), seconds={"read": seconds})


def partitions(out: str) -> dict[str, bytes]:
    folder = storage.join(out, "index")
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)}


def test_only_partitions_whose_segment_changed_are_written_again(tmp_path: Path) -> None:
    out = str(tmp_path)
    ledger = Ledger(f"{out}/ledger")
    put_receipts(ledger.url, big_receipts(range(2005)))
    assert ledger.compact(0)
    assert write_index(out, BIG, ledger, {}).ok == 2005
    first = partitions(out)
    assert list(first) == ["000000.parquet", "000001.parquet", "000002.parquet"]
    assert b"secret" not in b"".join(first.values())
    assert set(read_index(out, ["shard"])["shard"].to_pylist()) == {"https://host/a.tar"}

    # A segment behind a partition that stands is not read, not even where it is damaged; sums come from metadata.
    segment = tmp_path / "ledger/segments/000000.parquet"
    whole = segment.read_bytes()
    segment.write_bytes(b"damaged")
    put_receipts(ledger.url, big_receipts(range(1000, 2000), seconds=2.0))
    summary = write_index(out, BIG, ledger, {})
    assert (summary.ok, summary.seconds) == (2005, {"read": 2000.0})
    segment.write_bytes(whole)

    # What is taken back and done anew is indexed anew, open or in a segment.
    assert ledger.reopen([7]) == [7]
    with pytest.raises(StoreError, match=r"unit 7 .* has no receipt"):
        write_index(out, BIG, ledger, {})
    put_receipts(ledger.url, big_receipts([7], seconds=5.0))
    assert ledger.compact(0)
    assert write_index(out, BIG, ledger, {}).seconds == {"read": 2005.0}

    # Where data moved, the index says so.
    moved = dataclasses.replace(BIG, shards=(dataclasses.replace(BIG.shards[0], url="s3://b/a.tar"),))
    write_index(out, moved, ledger, {})
    assert set(read_index(out, ["shard"])["shard"].to_pylist()) == {"s3://b/a.tar"}


def test_partitions_beyond_the_plan_are_removed(tmp_path: Path) -> None:
    ledger = Ledger(f"{tmp_path}/ledger")
    put_receipts(ledger.url, big_receipts(range(2005)))
    write_index(str(tmp_path), BIG, ledger, {})
    small = dataclasses.replace(BIG, shards=(dataclasses.replace(BIG.shards[0], used=900),))
    assert write_index(str(tmp_path), small, ledger, {}).samples == 900
    assert list(partitions(str(tmp_path))) == ["000000.parquet"]
    assert len(read_index(str(tmp_path))) == 900


def test_a_damaged_partition_is_written_again(tmp_path: Path) -> None:
    ledger = Ledger(f"{tmp_path}/ledger")
    put_receipts(ledger.url, big_receipts(range(2005)))
    assert ledger.compact(0)
    write_index(str(tmp_path), BIG, ledger, {})
    before = partitions(str(tmp_path))
    (tmp_path / "index/000000.parquet").write_bytes(before["000000.parquet"][:-20])
    with pytest.raises(StoreError, match=r"index/000000\.parquet cannot be read as parquet .*damaged; verify"):
        read_index(str(tmp_path))
    write_index(str(tmp_path), BIG, ledger, {})
    assert partitions(str(tmp_path)) == before


def test_rows_of_some_units_are_read_alone(tmp_path: Path) -> None:
    ledger = Ledger(f"{tmp_path}/ledger")
    put_receipts(ledger.url, big_receipts(range(2005)))
    write_index(str(tmp_path), BIG, ledger, {})
    assert read_index(str(tmp_path), ["key"], units=[2001, 3, 4])["key"].to_pylist() == ["k3", "k4", "k2001"]
    assert read_index(str(tmp_path), ["key"], units=[])["key"].to_pylist() == []
    (tmp_path / "index/000001.parquet").write_bytes(b"")
    assert len(read_index(str(tmp_path), units=range(1000))) == 1000
    (tmp_path / "index/000001.parquet").unlink()
    with pytest.raises(StoreError, match=r"has partitions \[0, 2\] only"):
        read_index(str(tmp_path))


def test_an_outlier_may_stop_being_one(tmp_path: Path) -> None:
    out = str(tmp_path)
    ledger = Ledger(f"{out}/ledger")
    put_receipts(ledger.url, big_receipts(range(1, 2005), explained=0.8))
    put_receipts(ledger.url, big_receipts([0], explained=0.3))
    assert ledger.compact(0)
    write_index(out, BIG, ledger, {})
    before = partitions(out)
    flags = read_index(out, ["flags"])["flags"].to_pylist()
    assert [row for row, flag in enumerate(flags) if flag] == [0]
    write_index(out, BIG, ledger, {})
    assert partitions(out) == before
    # More than half of the images are like it now.
    put_receipts(ledger.url, big_receipts(range(1000, 2005), explained=0.3))
    write_index(out, BIG, ledger, {})
    assert not any(read_index(out, ["flags"])["flags"].to_pylist())

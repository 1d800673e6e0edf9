import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DamagedReceiptError, StoreError
from pipeline.inputs import storage
from pipeline.store.ledger import Ledger, SampleRecord
from pipeline.store.segments import UNITS_PER_SEGMENT, DoneUnits
from tests.pipeline.store.support import DIGEST, key_of, put_receipts, receipt_of


@pytest.fixture(params=["path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ledger") if request.param == "path" else f"memory://test_segments{tmp_path}/ledger"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A ledger of a thousand units in one segment, and five open receipts."""
    put_receipts(str(tmp_path / "ledger"), map(receipt_of, range(1005)))
    assert Ledger(str(tmp_path / "ledger")).compact(0)
    return tmp_path / "ledger"


def files(ledger: Path) -> dict[str, bytes]:
    return {str(path.relative_to(ledger)): path.read_bytes() for path in ledger.rglob("*") if path.is_file()}


def test_a_thousand_receipts_become_a_segment(url: str) -> None:
    ledger = Ledger(url)
    detailed = dataclasses.replace(
        receipt_of(700, 1),
        samples=(SampleRecord("schlüssel", 2800, "failed", "too_large", "9 x 9", (9, 9), {"a": [1]}, ("exif",)),),
        checksums={"seg": [None, 3]},
        worker={"host": "a"},
    )
    receipts = [detailed if unit == 700 else receipt_of(unit) for unit in range(1002)]
    put_receipts(url, receipts)
    assert ledger.done().compactable == [0]
    assert ledger.compact(0)
    assert storage.list_files(url) == ["000001/000001000.json", "000001/000001001.json", "segments/000000.parquet"]
    assert ledger.done() == set(range(1002))
    assert ledger.done().compactable == []
    again = Ledger(url)
    keys = [receipt.unit for receipt in receipts]
    assert [again.get(key, DIGEST) for key in (keys[0], keys[700], keys[999], keys[1001])] == [
        receipts[0], receipts[700], receipts[999], receipts[1001],
    ]  # fmt: skip
    assert [receipt for _, receipt in again.receipts((key, DIGEST) for key in keys)] == receipts
    with pytest.raises(StoreError, match=r"is the receipt of unit 700 .* of input 0123456789ab, expected unit 700"):
        again.get(key_of(700), "f" * 64)


def test_less_than_a_thousand_receipts_stay_open(url: str) -> None:
    put_receipts(url, map(receipt_of, [*range(999), 1000]))
    before = storage.list_files(url)
    assert not Ledger(url).compact(0)
    assert Ledger(url).done().compactable == []
    assert storage.list_files(url) == before


def test_compaction_cut_short_leaves_both_and_the_segment_counts(local: Path) -> None:
    ledger = Ledger(str(local))
    whole = files(local)
    stale = dataclasses.replace(receipt_of(3), seconds={"read": 9.0})
    put_receipts(str(local), [stale, receipt_of(4)])
    assert ledger.get(key_of(3), DIGEST) == receipt_of(3)
    done = ledger.done()
    assert (len(done), done == set(range(1005)), done.compactable) == (1005, True, [0])
    assert ledger.compact(0)
    assert files(local) == whole


def test_units_are_taken_back(url: str) -> None:
    ledger = Ledger(url)
    put_receipts(url, map(receipt_of, range(2003)))
    assert ledger.compact(0)
    assert ledger.compact(1)
    index = url.removesuffix("ledger") + "index"
    for number in range(3):
        storage.write_atomic(storage.join(index, f"{number:06d}.parquet"), b"partition")
    assert ledger.reopen([5, 6, 2001, 2002, 7000]) == [5, 6, 2001, 2002]
    assert ledger.done() == set(range(2003)) - {5, 6, 2001, 2002}
    assert ledger.done().segments.tolist() == [1]
    assert ledger.done().todo(2004).tolist() == [5, 6, 2001, 2002, 2003]
    assert storage.list_files(index) == ["000001.parquet"], "what was built from receipts taken back is gone"
    for unit in (0, 4, 7, 999, 1000, 2000):
        assert ledger.get(key_of(unit), DIGEST) == receipt_of(unit)
    assert ledger.get(key_of(5), DIGEST) is None
    changed = dataclasses.replace(receipt_of(5), seconds={"read": 2.0})
    for receipt in (changed, receipt_of(6)):
        ledger.commit(receipt)
    assert ledger.compact(0)
    assert ledger.get(key_of(5), DIGEST) == changed
    assert ledger.reopen([]) == []


def test_taking_back_removes_what_compaction_left_behind(local: Path) -> None:
    put_receipts(str(local), [receipt_of(3)])
    assert Ledger(str(local)).reopen([3]) == [3]
    assert Ledger(str(local)).get(key_of(3), DIGEST) is None


def test_a_crash_while_taking_back_loses_no_receipt(local: Path, tmp_path: Path) -> None:
    # All receipts but that of the unit are there before the segment goes: at no time is another unit not done.
    segment = (local / "segments/000000.parquet").read_bytes()
    assert Ledger(str(local)).reopen([5]) == [5]
    killed = tmp_path / "killed" / "ledger"
    shutil.copytree(local, killed)
    (killed / "segments").mkdir(exist_ok=True)
    (killed / "segments/000000.parquet").write_bytes(segment)
    assert Ledger(str(killed)).done() == set(range(1005))
    assert Ledger(str(killed)).reopen([5]) == [5]
    assert files(killed) == files(local)


def test_damage_in_a_segment_costs_the_units_around_it(local: Path) -> None:
    path = local / "segments/000000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ledger, damaged = Ledger(str(local)), []
    for unit in range(1000):
        try:
            assert ledger.get(key_of(unit), DIGEST) == receipt_of(unit)
        except DamagedReceiptError as error:
            damaged.append(error.unit)
    assert len(damaged) == 50, "a row group"
    assert ledger.reopen([damaged[0]]) == damaged
    assert ledger.done().todo(1005).tolist() == damaged


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"x" * 999], ids=["empty", "short", "other"])
def test_a_segment_that_is_no_parquet_costs_its_units(local: Path, damage: bytes) -> None:
    (local / "segments/000000.parquet").write_bytes(damage)
    ledger = Ledger(str(local))
    with pytest.raises(
        DamagedReceiptError, match=r"000000\.parquet is no segment of receipts .* with --repair"
    ) as caught:
        ledger.get(key_of(17), DIGEST)
    assert caught.value.unit == 17
    assert ledger.reopen([17]) == list(range(1000))
    assert ledger.done() == {1000, 1001, 1002, 1003, 1004}


def test_a_damaged_receipt_is_not_compacted(tmp_path: Path) -> None:
    put_receipts(str(tmp_path), map(receipt_of, range(1000)))
    (tmp_path / "000000/000000123.json").write_bytes(b"{")
    before = files(tmp_path)
    with pytest.raises(DamagedReceiptError) as caught:
        Ledger(str(tmp_path)).compact(0)
    assert caught.value.unit == 123
    assert files(tmp_path) == before
    (tmp_path / "000000/000000123.json").write_bytes(receipt_of(124).to_json())
    with pytest.raises(DamagedReceiptError, match=r"000000123\.json is the receipt of unit 124"):
        Ledger(str(tmp_path)).compact(0)


def test_attempts_are_counted_until_one_ends(url: str) -> None:
    ledger = Ledger(url)
    assert ledger.attempts(3) == 0
    ledger.begin_attempt(3, 0)
    Ledger(url).begin_attempt(3, ledger.attempts(3))
    ledger.begin_attempt(4, 0)
    assert (ledger.attempts(3), ledger.attempts(4), len(ledger.done())) == (2, 1, 0)
    ledger.end_attempt(4)
    ledger.end_attempt(4)
    assert (ledger.attempts(3), ledger.attempts(4)) == (2, 0)
    ledger.begin_attempt(5, 0)
    ledger.clear_attempts([3, 5, 9])
    assert storage.list_files(url) == []
    storage.write_atomic(storage.join(url, "attempts/000000003.json"), b"{")
    assert ledger.attempts(3) == 0


UNITS = st.sets(st.integers(0, 4 * UNITS_PER_SEGMENT))


@given(st.sets(st.integers(0, 3)), UNITS, st.integers(0, 4 * UNITS_PER_SEGMENT))
def test_units_that_are_done_are_a_set(segments: set[int], receipts: set[int], units: int) -> None:
    done = DoneUnits(segments, receipts)
    wanted = {unit for unit in range(4 * UNITS_PER_SEGMENT + 1) if unit // 1000 in segments or unit in receipts}
    assert done == wanted
    assert list(done) == sorted(wanted)
    assert len(done) == len(wanted)
    assert all((unit in done) == (unit in wanted) for unit in (0, 999, 1000, units, -1))
    assert done.todo(units).tolist() == [unit for unit in range(units) if unit not in wanted]
    assert np.array_equal(np.flatnonzero(done.mask(units)), sorted(unit for unit in wanted if unit < units))
    assert "0" not in done
    assert done & {0, 1, 2} == wanted & {0, 1, 2}

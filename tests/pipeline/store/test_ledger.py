import dataclasses
import itertools
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DamagedReceiptError, StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
from tests.pipeline.store.support import DIGEST, key_of, receipt_of


@pytest.fixture(params=["path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ledger") if request.param == "path" else f"memory://test_ledger{tmp_path}"


def test_what_is_committed_is_done(url: str) -> None:
    ledger = Ledger(url)
    assert ledger.done() == set()
    assert ledger.get(key_of(0), DIGEST) is None
    for unit in (5, 0, 999, 1000, 1_234_567):
        ledger.commit(receipt_of(unit))
    assert Ledger(url).done() == {0, 5, 999, 1000, 1_234_567}
    for unit in (0, 1000, 1_234_567):
        assert Ledger(url).get(key_of(unit), DIGEST) == receipt_of(unit)
    assert ledger.get(key_of(1), DIGEST) is None


def test_committing_again_replaces_the_receipt(url: str) -> None:
    ledger = Ledger(url)
    ledger.commit(receipt_of(3))
    second = dataclasses.replace(receipt_of(3), seconds={"read": 1.5})
    ledger.commit(second)
    assert ledger.get(key_of(3), DIGEST) == second
    assert len(storage.list_files(url)) == 1


def test_folders_stay_small(url: str) -> None:
    ledger = Ledger(url)
    for unit in (0, 999, 1000, 1999, 123_456_789):
        ledger.commit(receipt_of(unit))
    assert storage.list_files(url) == [
        "000000/000000000.json", "000000/000000999.json", "000001/000001000.json", "000001/000001999.json",
        "123456/123456789.json",
    ]  # fmt: skip


def test_a_unit_that_failed_is_not_done(url: str) -> None:
    ledger = Ledger(url)
    with pytest.raises(StoreError, match=r"unit 3 \(shard 0, .*\) failed \(out of memory\) and cannot be committed"):
        ledger.commit(dataclasses.replace(receipt_of(3), error="out of memory"))
    assert ledger.done() == set()


def test_files_still_being_written_are_not_done(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.commit(receipt_of(1))
    # What a writer that was killed leaves behind.
    (tmp_path / "000000" / ".000000002.json.partial").write_bytes(b"{")
    (tmp_path / "000000" / f".{'0' * 32}.partial").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("x")
    assert ledger.done() == {1}


def test_readers_see_whole_receipts_while_they_are_replaced(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    versions = [dataclasses.replace(receipt_of(0, 4), worker={"pad": str(n) * 50_000}) for n in range(3)]
    ledger.commit(versions[0])
    stop = threading.Event()

    def write() -> None:
        for version in itertools.islice(itertools.cycle(versions), 12):
            ledger.commit(version)
        stop.set()

    seen = []
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        while not stop.is_set() and not writer.done():
            seen.append(ledger.get(key_of(0, 4), DIGEST))
        writer.result()
    assert seen
    assert all(receipt in versions for receipt in seen)


@pytest.mark.parametrize(
    ("key", "shard", "text"),
    [
        (key_of(3, 2), "f" * 64, "expected unit 3 (shard 0, samples 12:14, row 12) of input ffffffffffff; the ledger"),
        (
            key_of(3, 1),
            DIGEST,
            "expected unit 3 (shard 0, samples 12:13, row 12) of input 0123456789ab; the ledger was",
        ),
        (UnitKey(3, 1, 12, 14, 12), DIGEST, "expected unit 3 (shard 1, samples 12:14, row 12) of input 0123456789ab"),
        (UnitKey(3, 0, 12, 14, 24), DIGEST, "expected unit 3 (shard 0, samples 12:14, row 24) of input 0123456789ab"),
    ],
    ids=["digest", "samples", "shard", "row"],
)
def test_a_receipt_of_another_input_or_unit_is_refused(url: str, key: UnitKey, shard: str, text: str) -> None:
    ledger = Ledger(url)
    ledger.commit(receipt_of(3))
    found = "is the receipt of unit 3 (shard 0, samples 12:14, row 12) of input 0123456789ab, "
    with pytest.raises(StoreError, match=re.escape(found + text)):
        ledger.get(key, shard)


def test_a_receipt_under_the_name_of_another_unit_is_refused(url: str) -> None:
    ledger = Ledger(url)
    ledger.commit(receipt_of(3))
    storage.write_atomic(
        storage.join(url, "000000/000000004.json"), storage.read_bytes(f"{url}/000000/000000003.json")
    )  # fmt: skip
    with pytest.raises(StoreError, match=r"000000004\.json is the receipt of unit 3 .*, expected unit 4 "):
        ledger.get(key_of(4), DIGEST)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b"{}", b'{"unit": 3, "samples": []}'], ids=repr)
def test_a_damaged_receipt_is_refused(url: str, damage: bytes) -> None:
    ledger = Ledger(url)
    storage.write_atomic(storage.join(url, "000000/000000003.json"), damage)
    text = r"000000003\.json is no receipt .*verify the store with --repair, then run the job again"
    with pytest.raises(DamagedReceiptError, match=text) as caught:
        ledger.get(key_of(3), DIGEST)
    assert pickle.loads(pickle.dumps(caught.value)).unit == caught.value.unit == 3


def test_receipts_come_in_the_order_of_their_keys(url: str) -> None:
    ledger = Ledger(url)
    for unit in (0, 2, 3):
        ledger.commit(receipt_of(unit))
    # More keys than are read at once by two threads.
    order = [3, 1, 0, 2, *range(10, 300)]
    found = list(ledger.receipts(((key_of(unit), DIGEST) for unit in order), threads=2))
    assert [key.unit for key, _ in found] == order
    assert [receipt for _, receipt in found[:4]] == [receipt_of(3), None, receipt_of(0), receipt_of(2)]
    assert not any(receipt for _, receipt in found[4:])
    assert list(ledger.receipts([])) == []


def test_reading_many_receipts_stops_at_a_strange_one(url: str) -> None:
    ledger = Ledger(url)
    ledger.commit(receipt_of(0))
    ledger.commit(receipt_of(1, shard="f" * 64))
    with pytest.raises(StoreError, match="of input ffffffffffff, expected"):
        list(ledger.receipts((key_of(unit), DIGEST) for unit in (0, 1)))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNTS = st.integers(0, 2**40)
SAMPLES = st.builds(
    SampleRecord,
    key=TEXTS,
    row=COUNTS,
    status=st.sampled_from(["ok", "failed"]),
    reason=TEXTS,
    detail=TEXTS,
    source_size=st.none() | st.tuples(COUNTS, COUNTS),
    transform=st.none() | st.dictionaries(TEXTS, COUNTS | st.floats(allow_nan=False) | st.lists(COUNTS), max_size=3),
    flags=st.lists(TEXTS, max_size=3).map(tuple),
    orientation=st.integers(1, 8),
    decoder=TEXTS,
    sha256=TEXTS,
)
RECEIPTS = st.builds(
    Receipt,
    unit=st.builds(
        lambda unit, shard, start, count, row: UnitKey(unit, shard, start, start + count, row),
        *[COUNTS] * 3, st.integers(1, 99), COUNTS,
    ),
    shard=TEXTS,
    samples=st.lists(SAMPLES, max_size=4).map(tuple),
    checksums=st.dictionaries(TEXTS, st.lists(st.none() | st.integers(0, 2**32 - 1), max_size=4), max_size=3),
    seconds=st.dictionaries(TEXTS, st.floats(allow_nan=False), max_size=3),
    sizes=st.dictionaries(TEXTS, COUNTS, max_size=3),
    worker=st.dictionaries(TEXTS, TEXTS | COUNTS, max_size=3),
    error=TEXTS,
)  # fmt: skip


@given(RECEIPTS)
def test_a_receipt_reads_back_from_json(receipt: Receipt) -> None:
    assert Receipt.from_json(receipt.to_json()) == receipt

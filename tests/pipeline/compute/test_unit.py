from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline.compute.unit import BROKEN_CONTEXT_STATUS
from pipeline.store.index import read_index
from tests.e2e.support import good_sample, write_tar
from tests.pipeline.compute.support import Store, make_config, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write_tar(tmp_path / "a.tar", [member for n in range(6) for member in good_sample(f"k{n}", n)])
    return open_store(make_config(tmp_path / "a.tar", tmp_path / "out", labels=("seg",), unit_attempts=3))


def test_a_unit_is_written_once_and_leaves_no_marker(store: Store) -> None:
    processor = store.processor()
    key, loaded = store.plan.unit(1), store.load(1)
    outcome = processor.process(key, loaded)
    assert (outcome.fault, outcome.receipt.error) == ("", "")
    assert [record.status for record in outcome.receipt.samples] == ["ok", "ok"]
    assert store.ledger.attempts(1) == 0
    place = Path(store.config.out) / "features.zarr" / "features" / "c" / "1" / "0" / "0" / "0"
    before = place.stat().st_mtime_ns
    assert processor.process(key, loaded).receipt == outcome.receipt
    assert place.stat().st_mtime_ns == before


def test_a_unit_that_ends_its_process_is_given_up_after_its_attempts_and_listed(store: Store) -> None:
    """It was tried again for ever. An attempt that never ended is what a killed process leaves behind."""
    for earlier in range(3):
        store.ledger.begin_attempt(0, earlier)
    outcome = store.processor().process(store.plan.unit(0), store.load(0))
    assert outcome.fault == ""
    assert {record.status for record in outcome.receipt.samples} == {"failed"}
    assert {record.reason for record in outcome.receipt.samples} == {"unit_failed"}
    assert "ended its process 3 times and is given up" in outcome.receipt.samples[0].detail
    assert "--retry-failed unit_failed" in outcome.receipt.samples[0].detail
    summary = store.run()
    assert (summary.samples, summary.ok, summary.failed) == (6, 2, 4)
    table = read_index(store.config.out, ["key", "status", "reason"]).to_pylist()
    assert [row["reason"] for row in table] == ["unit_failed"] * 4 + [""] * 2
    root = zarr.open_group(Path(store.config.out) / "features.zarr", mode="r")
    assert np.asarray(root["status"][:]).tolist() == [2, 2, 2, 2, 1, 1, 0, 0]
    # Tried again on request, it succeeds and has data.
    store.ledger.reopen([0])
    assert store.run().ok == 6
    assert np.isfinite(np.asarray(root["features"][:6])).all()


def test_a_cuda_error_ends_the_process_and_its_unit_is_left_to_another(store: Store) -> None:
    """It turned one unit after the other into a failure, at ten times the pace of good ones."""
    ended: list[int] = []

    class EndedError(Exception):
        pass

    def end(status: int) -> None:
        ended.append(status)
        raise EndedError

    processor = store.processor(end_process=end)

    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    processor.extractor.backbone.register_forward_pre_hook(broken)
    with pytest.raises(EndedError):
        processor.process(store.plan.unit(0), store.load(0))
    assert ended == [BROKEN_CONTEXT_STATUS]
    assert store.ledger.attempts(0) == 1, (
        "the attempt counts, or a unit that breaks every context would be tried for ever"
    )


def test_what_a_device_gets_wrong_by_chance_is_computed_again(store: Store) -> None:
    failures = [RuntimeError("by chance"), RuntimeError("by chance")]
    processor = store.processor()

    def fail(*_: object) -> None:
        if failures:
            raise failures.pop()

    processor.extractor.backbone.register_forward_pre_hook(fail)
    assert processor.process(store.plan.unit(0), store.load(0)).fault == ""
    assert not failures


def test_what_fails_every_time_fails_the_unit_alone_and_is_tried_by_the_next_run(store: Store) -> None:
    calls = []
    processor = store.processor()

    def fail(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("every time")

    hook = processor.extractor.backbone.register_forward_pre_hook(fail)
    outcome = processor.process(store.plan.unit(0), store.load(0))
    assert (outcome.fault, len(calls)) == ("unit", 3)
    assert outcome.receipt.error == "RuntimeError: every time"
    assert store.ledger.attempts(0) == 0
    hook.remove()
    assert store.run().ok == 6


def test_a_write_that_cannot_succeed_is_told_and_nothing_is_computed_again(store: Store) -> None:
    processor = store.processor()
    calls = []
    processor.extractor.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    data = Path(store.config.out) / "features.zarr" / "features" / "c"
    data.mkdir(exist_ok=True)
    (data / "0").write_bytes(b"a file where a folder must be")
    outcome = processor.process(store.plan.unit(0), store.load(0))
    assert outcome.receipt.error
    assert len(calls) == 1


def test_a_run_that_is_stopped_does_not_count_against_the_units_it_was_at(store: Store) -> None:
    store.ledger.begin_attempt(0, 0)
    for earlier in range(2):
        store.ledger.begin_attempt(1, earlier)
    store.ledger.forgive_attempts()
    assert (store.ledger.attempts(0), store.ledger.attempts(1)) == (0, 1)

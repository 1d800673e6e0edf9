"""The job on a store, in a process of its own with its own Ray."""

from pathlib import Path

import pytest

from pipeline.cluster.verify import verify
from pipeline.errors import LeaseError
from pipeline.store.layout import store_attributes
from pipeline.store.lease import Lease
from pipeline.store.ledger import Ledger
from tests.e2e import support
from tests.pipeline.store.test_verify import flip, made, out

__all__ = ["made", "out"]  # fixtures


@pytest.mark.ray
def test_damage_is_found_set_back_and_leftovers_removed(out: str) -> None:
    flip(f"{out}/features.zarr/features/c/1/0/0/0")
    leftover = Path(out, "features.zarr/cls/c/.x.partial")
    leftover.write_bytes(b"")
    text = support.run("verify", out, "--repair", "--remove-partial", "--object-store-mb", 100, status=1)
    assert "unit 1 (shard 0, samples 4:6, row 4): features cannot be read" in text
    assert "1 leftover .partial files removed" in text
    assert "repair: 1 units set back (1), 0 parts of the index removed" in text
    assert "labels of 3 units compared with the input" in text
    assert not leftover.exists()
    assert Ledger(f"{out}/ledger").done() == {0, 2}
    assert not store_attributes(out)["complete"]
    assert not Path(out, "lease.json").exists()


def test_a_store_that_a_job_is_at_work_on_is_not_repaired(out: str) -> None:
    with Lease.acquire(out), pytest.raises(LeaseError):
        verify(out, 100, repair=True)

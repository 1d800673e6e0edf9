"""One of the random kills of ``benchmarks/random_kills.py``, with a fixed seed, and of the process that loads.

Those of the actor and the driver are in ``test_kill.py``.
"""

from pathlib import Path

import pytest

from tests.e2e import random_kills
from tests.e2e.random_kills import Campaign, Kill, OnDisk


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_loader_that_is_killed_changes_nothing_in_the_store(tmp_path: Path) -> None:
    random_kills.write_shards(tmp_path / "shards")
    shards = str(tmp_path / "shards" / "kill-*.tar")
    expected = random_kills.uninterrupted(shards, tmp_path / "whole")
    # A kill whose time does not come before the job is done is left for another store.
    queue, seed, kills = ["loader"], 14, list[Kill]()
    while queue and seed < 17:
        place = OnDisk(tmp_path / f"out-{seed}")
        those = Campaign(place, shards, seed, tmp_path / f"logs-{seed}").run(queue, expected)
        kills, queue, seed = kills + those, queue[len(those) :], seed + 1
    print(random_kills.table(kills))
    assert [kill.kind for kill in kills] == ["loader"]

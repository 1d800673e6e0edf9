import itertools
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compute.allotment import Allotment, Work, actor_bytes, allot, peak_bytes, this_machine
from pipeline.compute.prepare import layout_of
from pipeline.config.precompute import PrecomputeConfig
from pipeline.options import Size

OPTIONS: dict[str, Any] = {"actors": 1, "cpus_per_actor": None, "gpus_per_actor": None, "loader_cpus": None}
GB = 10**9


def allotted(cpus: float, gpus: float = 0, nodes: int = 1, **options: Any) -> Allotment:
    machines = [{"CPU": cpus / nodes, "GPU": gpus / nodes}] * nodes
    return allot(machines, **(OPTIONS | options))


def lacks(allotment: Allotment, cpus: float, gpus: float = 0) -> str:
    return allotment.missing([{"CPU": cpus, "GPU": gpus}])


@given(cpus=st.integers(1, 256), actors=st.one_of(st.integers(1, 64), st.just("auto")))
def test_what_is_not_given_always_fits_and_keeps_the_stages_apart(cpus: int, actors: int | str) -> None:
    """Today's defaults wait for ever on one CPU, and `--actors 2` does on two."""
    allotment = allotted(cpus, actors=actors)
    assert lacks(allotment, cpus) == ""
    assert allotment.cpus_per_actor > 0
    assert allotment.loader_cpus > 0
    # Equal resources make Ray run loading inside the actors.
    assert allotment.cpus_per_actor != allotment.loader_cpus


def test_a_machine_with_room_gets_whole_cores() -> None:
    allotment = allotted(8)
    assert (allotment.cpus_per_actor, allotment.loader_cpus, allotment.gpus_per_actor) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"actors": 2, "cpus_per_actor": 1.0}, ["2 actors of 1 CPUs and a loader of 0.5 need 2.5 CPUs, there are 2"]),
        ({"cpus_per_actor": 2.0}, ["need 2.5 CPUs, there are 2", "--cpus-per-actor"]),
        ({"actors": "auto", "cpus_per_actor": 2.0}, ["1 actors of 2 CPUs and a loader of 0.5 need 2.5 CPUs"]),
        ({"gpus_per_actor": 1.0}, ["1 actors of 1 GPUs need 1 GPUs, there are 0", "--gpus-per-actor 0"]),
        ({"actors": "auto", "gpus_per_actor": 1.0}, ["1 actors of 1 GPUs need 1 GPUs, there are 0"]),
    ],
)
def test_what_cannot_come_is_named(options: dict[str, Any], texts: list[str]) -> None:
    text = lacks(allotted(2, **options), 2)
    assert all(part in text for part in texts), text


@pytest.mark.parametrize(
    ("machine", "options", "text"),
    [
        (
            {"CPU": 8.0, "GPU": 1.0},
            {"gpus_per_actor": 2.0},
            "of 1 actors of 1 CPUs and 2 GPUs each, 0 fit on 2 machines",
        ),
        ({"CPU": 2.0}, {"cpus_per_actor": 3.0}, "0 fit on 2 machines, the largest of 2 CPUs and 0 GPUs; give fewer"),
        ({"CPU": 3.0}, {"cpus_per_actor": 2.0, "actors": 2}, ""),
        ({"CPU": 3.0}, {"cpus_per_actor": 1.8, "actors": 3}, "of 3 actors of 1.8 CPUs and 0 GPUs each, 2 fit on 2"),
    ],
)
def test_what_no_single_machine_has_is_named(machine: dict[str, float], options: dict[str, Any], text: str) -> None:
    """Both together have it, and the job waited for ever."""
    machines = [machine, machine]
    for actors in (options.pop("actors", 1), "auto"):
        if actors == "auto" and "3 actors" in text:
            continue
        found = allot(machines, **(OPTIONS | {"actors": actors} | options)).missing(machines)
        assert text in found, found
        assert bool(text) == bool(found)


@given(cores=st.lists(st.integers(1, 64), min_size=1, max_size=6), actors=st.integers(1, 40))
def test_a_share_of_the_cores_fits_on_single_machines(cores: list[int], actors: int) -> None:
    machines = [{"CPU": float(count)} for count in cores]
    assert allot(machines, **(OPTIONS | {"actors": actors})).missing(machines) == ""


def test_cores_beside_gpus_are_shared_among_the_actors_of_their_machine() -> None:
    """Another machine's cores do not help actors that need its GPUs."""
    machines = [{"CPU": 4.0, "GPU": 8.0}, {"CPU": 64.0}]
    allotment = allot(machines, **(OPTIONS | {"actors": 8}))
    assert (allotment.gpus_per_actor, allotment.cpus_per_actor) == (1.0, 0.49), "0.5 is the loaders'"
    assert allotment.missing(machines) == ""
    assert allot([{"CPU": 8.0}], **(OPTIONS | {"gpus_per_actor": 1.0})).cpus_per_actor == 1.0, "none is there yet"


def test_gpus_are_used_where_there_are_any_and_unused_ones_are_named() -> None:
    assert allotted(16, gpus=1).gpus_per_actor == 1
    assert allotted(16, gpus=1).hint == ""
    assert "8 GPUs are here and 1 will be used; --actors 8" in allotted(16, gpus=8).hint
    assert allotted(16, gpus=8, gpus_per_actor=0.0).hint == ""


@pytest.mark.parametrize(("actors", "nodes", "here"), [(1, 1, 1), (8, 8, 1), (8, 3, 3), (2, 4, 1)])
def test_actors_share_the_cores_of_their_machine_not_those_of_the_cluster(actors: int, nodes: int, here: int) -> None:
    """Eight actors on eight machines got one thread each."""
    assert allotted(64, actors=actors, nodes=nodes).actors_per_node == here


def test_machines_without_a_gpu_share_in_no_actor_that_has_one() -> None:
    """Beside a head without GPUs, eight actors on one machine counted as four of each machine."""
    machines = [{"CPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}]
    assert allot(machines, **(OPTIONS | {"actors": 8})).actors_per_node == 8
    assert allot(machines, **(OPTIONS | {"actors": 8, "gpus_per_actor": 0.0})).actors_per_node == 4


@pytest.mark.parametrize(
    ("machines", "options", "actors", "hint"),
    [
        ([{"CPU": 2}], {}, 2, "actors: 2 (auto: one for each core)"),
        ([{"CPU": 1}], {}, 1, "actors: 1 (auto: one for each core)"),
        ([{"CPU": 16}, {"CPU": 8}], {}, 24, "actors: 24 (auto: one for each core)"),
        ([{"CPU": 16}], {"cpus_per_actor": 4.0}, 3, "actors: 3 (auto: one for each core)"),
        ([{"CPU": 16, "GPU": 2}], {}, 2, "actors: 2 (auto: one for each GPU)"),
        ([{"CPU": 4}, {"CPU": 16, "GPU": 4}], {}, 4, "actors: 4 (auto: one for each GPU)"),
        ([{"CPU": 16, "GPU": 2}], {"gpus_per_actor": 0.0}, 16, "actors: 16 (auto: one for each core)"),
        # A share of a GPU lies on one GPU, and whole ones on one machine.
        ([{"CPU": 16, "GPU": 2}], {"gpus_per_actor": 0.4}, 4, "actors: 4 (auto: 0.4 GPUs for each)"),
        ([{"CPU": 16, "GPU": 3}] * 2, {"gpus_per_actor": 2.0}, 2, "actors: 2 (auto: 2 GPUs for each)"),
        # An autoscaled cluster whose head alone is there.
        ([{"CPU": 4}], {"gpus_per_actor": 1.0}, 1, "actors: 1 (auto: no GPU for one is there yet)"),
    ],
)
def test_auto_is_one_actor_for_each_gpu_or_core(
    machines: list[dict[str, float]], options: dict[str, Any], actors: int, hint: str
) -> None:
    allotment = allot(machines, **(OPTIONS | {"actors": "auto"} | options))
    assert (allotment.actors, allotment.hint) == (actors, hint)


@pytest.mark.parametrize(
    ("memory", "work", "actors", "reason"),
    [
        ([64 * GB], Work(1000, 2 * GB, fits=False), 16, "one for each core"),
        ([16 * GB], Work(1000, 2 * GB, fits=False), 6, "16.0 GB of free memory, about 2.0 GB for each"),
        # What one machine has helps no other.
        ([64 * GB, 3 * GB], Work(1000, 2 * GB, fits=False), 17, "67.0 GB of free memory, about 2.0 GB for each"),
        ([GB], Work(1000, 2 * GB, fits=False), 1, "1.0 GB of free memory, about 2.0 GB for each"),
        ([64 * GB], Work(14, 2 * GB, fits=False), 3, "14 units to do, at least 4 for each"),
        ([64 * GB], Work(2, 2 * GB, fits=False), 1, "2 units to do, at least 4 for each"),
        # Units of images that are fitted take minutes.
        ([64 * GB], Work(14, 2 * GB, fits=True), 14, "14 units to do, at least 1 for each"),
    ],
)
def test_auto_is_fewer_where_memory_or_work_do_not_suffice(
    memory: list[int], work: Work, actors: int, reason: str
) -> None:
    machines = [{"CPU": 16.0, "memory": float(free)} for free in memory]
    allotment = allot(machines, **(OPTIONS | {"actors": "auto"}), work=work)
    assert (allotment.actors, allotment.hint) == (actors, f"actors: {actors} (auto: {reason})")
    # A number that is given stands.
    assert allot(machines, **(OPTIONS | {"actors": 9}), work=work).actors == 9


def test_the_memory_of_an_actor_is_models_one_batch_and_two_units_with_their_encodings() -> None:
    config = PrecomputeConfig(shards=("a.tar",), out="out", size=Size(32, 64), batch_size=2, store_image=False)
    layout = layout_of(config, rows_per_shard=4, channels=5, units=3)
    unit = 4 * (32 * 64 * 5 * 2 + 1)
    assert actor_bytes(config, layout, peak=1000) == 1000 + 16 * 12 * 2 * 32 * 64 + 4 * unit


def test_this_machine_has_what_this_process_may_use() -> None:
    has = this_machine()
    assert has["CPU"] >= 1
    # This process runs, and more than its own is not free.
    assert 0 < peak_bytes() < 100 * GB
    assert 0 < has["memory"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_actors_auto_is_no_part_of_what_a_store_is() -> None:
    identities = [
        PrecomputeConfig(shards=("a.tar",), out="out", actors=actors).identity()  # type: ignore[arg-type]
        for actors in ("auto", 1, 7)
    ]
    assert all(one == other for one, other in itertools.pairwise(identities))

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster.resources import Allotment, allot, await_resources
from pipeline.errors import ConfigError

OPTIONS = {"actors": 1, "cpus_per_actor": None, "gpus_per_actor": None, "loader_cpus": None}


def allotted(cpus: float, gpus: float = 0, nodes: int = 1, **options: float) -> Allotment:
    return allot({"CPU": cpus, "GPU": gpus}, nodes=nodes, **(OPTIONS | options))  # type: ignore[arg-type]


def check(allotment: Allotment, cpus: float, gpus: float = 0) -> None:
    """Raises at once where the machine is too small."""
    await_resources(lambda: allotment.missing({"CPU": cpus, "GPU": gpus}), seconds=0, report=print)


@given(cpus=st.integers(1, 256), actors=st.integers(1, 64))
def test_what_is_not_given_always_fits_and_keeps_the_stages_apart(cpus: int, actors: int) -> None:
    """Today's defaults wait for ever on one CPU, and `--actors 2` does on two."""
    allotment = allotted(cpus, actors=actors)
    check(allotment, cpus)
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
        ({"gpus_per_actor": 1.0}, ["1 actors of 1 GPUs need 1 GPUs, there are 0", "--gpus-per-actor 0"]),
    ],
)
def test_what_cannot_come_is_refused_at_once(options: dict[str, float], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(allotted(2, **options), 2)
    for text in ["the job would wait for ever", *texts]:
        assert text in str(error.value)


def test_gpus_are_used_where_there_are_any_and_unused_ones_are_named() -> None:
    assert allotted(16, gpus=1).gpus_per_actor == 1
    assert allotted(16, gpus=1).hint == ""
    assert "8 GPUs are here and 1 will be used; --actors 8" in allotted(16, gpus=8).hint
    assert allotted(16, gpus=8, gpus_per_actor=0.0).hint == ""


@pytest.mark.parametrize(("actors", "nodes", "here"), [(1, 1, 1), (8, 8, 1), (8, 3, 3), (2, 4, 1)])
def test_actors_share_the_cores_of_their_machine_not_those_of_the_cluster(actors: int, nodes: int, here: int) -> None:
    """Eight actors on eight machines got one thread each."""
    assert allotted(64, actors=actors, nodes=nodes).actors_per_node == here


def test_machines_that_join_later_are_waited_for_with_a_line_every_half_minute() -> None:
    now = [0.0]
    lines: list[str] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    need = allotted(4, gpus_per_actor=1.0)
    await_resources(
        lambda: need.missing({"CPU": 4, "GPU": 1 if now[0] >= 100 else 0}),
        seconds=1800,
        report=lines.append,
        clock=lambda: now[0],
        sleep=sleep,
    )
    assert 100 <= now[0] < 103
    assert len(lines) == 4
    assert all("waiting for machines" in line and "need 1 GPUs, there are 0" in line for line in lines)
    with pytest.raises(ConfigError, match="wait for ever after 60 s"):
        await_resources(
            lambda: need.missing({"CPU": 4}),
            seconds=60,
            report=lines.append,
            clock=lambda: now[0],
            sleep=sleep,
        )

import pytest

from pipeline.cluster.resources import await_resources
from pipeline.compute.allotment import allot
from pipeline.errors import ConfigError


def test_machines_that_join_later_are_waited_for_with_a_line_every_half_minute() -> None:
    now = [0.0]
    lines: list[str] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    need = allot([{"CPU": 4}], actors=1, cpus_per_actor=None, gpus_per_actor=1.0, loader_cpus=None)
    await_resources(
        lambda: need.missing([{"CPU": 4, "GPU": 1 if now[0] >= 100 else 0}]),
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
            lambda: need.missing([{"CPU": 4}]),
            seconds=60,
            report=lines.append,
            clock=lambda: now[0],
            sleep=sleep,
        )

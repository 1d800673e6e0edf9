import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster.connect import check_address, short_temporary_folder
from pipeline.errors import ConfigError, EnvironmentFault

ROOT = Path(__file__).resolve().parents[3]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_does_not_answer_is_told_at_once(scheme: str) -> None:
    """Ray tries for ten minutes."""
    address = f"{scheme}127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(ConfigError, match="no Ray cluster answers there") as error:
        check_address(address)
    assert address in str(error.value)
    assert "unset RAY_ADDRESS" in str(error.value)
    assert time.monotonic() - started < 20


def test_something_that_listens_is_left_to_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")
    check_address("auto")


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:", ":6379", "127.0.0.1:port"])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        check_address(address)


def test_a_job_for_a_dead_cluster_ends_with_one_line(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.precompute", "--shards", "/a.tar", "--out", str(tmp_path / "out")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no Ray cluster answers there" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_short_folders_are_left_to_ray_and_long_ones_are_replaced(tmp_path: Path) -> None:
    """Paths of Unix sockets have at most 107 bytes."""
    assert short_temporary_folder("/tmp") is None
    deep = tmp_path / ("x" * 60) / ("y" * 40)
    deep.mkdir(parents=True)
    short = short_temporary_folder(str(deep))
    assert short is not None
    assert len(short) < 30


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="set TMPDIR"):
        short_temporary_folder(str(tmp_path / "missing"))


def test_ray_starts_under_a_long_temporary_folder(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 40)
    deep.mkdir(parents=True)
    script = "import ray; from pipeline.cluster.connect import connect; connect(100); print(ray.get(ray.put(7)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        | {"TMPDIR": str(deep), "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip().endswith("7"), done.stderr[-2000:]

"""``ray job submit`` to a cluster that ``ray start`` made on this machine."""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.loader import FeatureDataset
from tests.e2e import support

# Ray asks for a token by default; a cluster of the test's own has one of its own.
ENVIRONMENT = support.environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the dashboard of a fresh one-node cluster, which ends with the tests."""
    port, dashboard_port = _free_port(), _free_port()
    folder = tmp_path_factory.mktemp("cluster")
    command = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}"]
    # Of two Rays on a machine one gets the agent's usual port, and to the other no job can be submitted.
    command += [f"--dashboard-agent-listen-port={_free_port()}", f"--dashboard-agent-grpc-port={_free_port()}"]
    command += ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", "--include-dashboard=true"]
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard_port}"

    def answers() -> bool:
        assert head.poll() is None, (folder / "log").read_text()[-3000:]
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", dashboard_port)) == 0

    try:
        support.wait_for(answers, "the dashboard")
        yield address
    finally:
        # This cluster's own process group, and nothing else of Ray's on the machine.
        os.killpg(head.pid, signal.SIGTERM)
        try:
            # Its processes end one after the other; there is nothing to be kept of this cluster.
            head.wait(timeout=3)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        # Ray would go on looking for this cluster in everything that is started on the machine later.
        recorded = Path("/tmp/ray/ray_current_cluster")
        if recorded.exists() and recorded.read_text().endswith(f":{port}"):
            recorded.unlink()


def _submit(address: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = ["ray", "job", "submit", "--address", address, "--working-dir", str(support.ROOT)]
    command += ["--", "python", "-m", "jobs.precompute", *map(str, args)]
    end = time.monotonic() + 90
    while True:
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
        # The dashboard answers before the agent that starts jobs does.
        if "No available agent to submit job" not in done.stderr or time.monotonic() > end:
            return done
        time.sleep(2)


@pytest.mark.ray
def test_submitted_jobs_end_with_success_or_failure(dashboard: str, tmp_path: Path) -> None:
    members = [member for n in range(6) for member in support.good_sample(f"s{n}", n)]
    support.write_tar(tmp_path / "whole.tar", members)
    options = (*support.TINY, "--labels", "seg", "--rows-per-shard", 2)
    good = _submit(dashboard, "--shards", tmp_path / "whole.tar", "--out", tmp_path / "whole", *options)
    text = good.stdout + good.stderr
    assert good.returncode == 0, text[-4000:]
    assert "input 6 = ok 6 + failed 0" in text
    assert "succeeded" in text
    assert len(FeatureDataset(str(tmp_path / "whole"), ["features", "seg"])) == 6
    bad = _submit(dashboard, "--shards", tmp_path / "none.tar", "--out", tmp_path / "bad", *options)
    text = bad.stdout + bad.stderr
    assert bad.returncode != 0, text[-4000:]
    assert "none.tar" in text

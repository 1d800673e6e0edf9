"""A one-node Ray cluster that a block of README starts, on ports of its own, and its end."""

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from tests.e2e.readme.blocks import Block

__all__ = ["Cluster", "own_cluster"]

_MARK = "FEATUP_README_CLUSTER"


@dataclass(frozen=True)
class Cluster:
    """Ports that are free on this machine, and variables that mark all processes that are started with them."""

    port: int
    dashboard: int
    options: str
    environment: dict[str, str]

    @property
    def address(self) -> str:
        """Of the server that takes jobs."""
        return f"http://127.0.0.1:{self.dashboard}"

    def adapt(self, block: Block) -> Block:
        """The block with this cluster's ports and a small size: another Ray on the machine may have the usual ports.

        Nothing else of the text is changed.
        """
        assert "ray start --head " in block.text, block
        assert "http://127.0.0.1:8265" in block.text, block
        text = block.text.replace("ray start --head ", f"ray start --head {self.options} ")
        return replace(block, text=text.replace("http://127.0.0.1:8265", self.address))


@contextmanager
def own_cluster(home: Path) -> Iterator[Cluster]:
    """Ports and an environment for a cluster; in the end every process that has this environment is ended.

    Args:
        home: an empty folder, the user's home: no Ray was ever used there.
    """
    mark = secrets.token_hex(16)
    with _free_ports(4) as (port, dashboard, listen, grpc):
        pass
    options = (
        f"--port={port} --dashboard-port={dashboard} --dashboard-agent-listen-port={listen} "
        f"--dashboard-agent-grpc-port={grpc} --num-cpus=2 --object-store-memory=100000000 --disable-usage-stats"
    )
    try:
        yield Cluster(port, dashboard, options, {"HOME": str(home), _MARK: mark})
    finally:
        # ``ray stop`` would end every Ray of this user; there is nothing to be kept of this one.
        processes = [process for process in psutil.process_iter() if _has(process, mark)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)
        # Ray would go on looking for this cluster in everything that is started on the machine later.
        recorded = Path("/tmp/ray/ray_current_cluster")
        if recorded.exists() and recorded.read_text().endswith(f":{port}"):
            recorded.unlink()


@contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        yield [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(_MARK) == mark
    except (psutil.Error, OSError):
        return False

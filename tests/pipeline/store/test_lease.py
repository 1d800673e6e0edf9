import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LeaseError
from pipeline.inputs import storage
from pipeline.store.lease import Lease, LeaseInfo, holder
from pipeline.store.processes import has_ended, process_start, this_machine

# Short enough for a test, long enough for a machine with other work.
FAST = {"interval": 0.2, "stale_after": 1.5}
LONG_AGO = "2026-01-01T00:00:00+00:00"
# Reads a store's URL per line; takes its lease and says so, or by whom it is held; releases it on the next line.
DRIVER = """
import sys, time
from pipeline.errors import LeaseError
from pipeline.store.lease import Lease
print("ready", flush=True)
for line in sys.stdin:
    try:
        with Lease.acquire(line.strip(), interval=0.2, stale_after=1.5) as lease:
            print("holds", flush=True)
            sys.stdin.readline()
            lease.check()
            print("still holds", flush=True)
        print("released", flush=True)
    except LeaseError as error:
        print(error, flush=True)
"""
needs_proc = pytest.mark.skipif(not this_machine(), reason="this system does not tell when it was started")


class Driver:
    """A driver in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.read() == "ready"

    def write(self, line: str = "") -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    pair = [Driver(), Driver()]
    yield pair
    for driver in pair:
        driver.end()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an S3 server on this machine."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import fsspec

    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = fsspec.config.conf.get("s3")
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    name = f"s3://lease-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    yield name
    fsspec.config.conf.pop("s3")
    if before is not None:
        fsspec.config.conf["s3"] = before
    server.stop()


@pytest.fixture(params=["path", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"
    return str(tmp_path / "out") if request.param == "path" else f"memory://test_lease{tmp_path}"


def foreign(heartbeat: float, **other: Any) -> LeaseInfo:
    """The lease of a driver on another host."""
    info = LeaseInfo("f" * 32, "far", 4711, "ann", "featup precompute", LONG_AGO, LONG_AGO, heartbeat, 0.2)
    return dataclasses.replace(info, machine="another", process_start="1", **other)


def write_lease(url: str, info: LeaseInfo) -> None:
    assert storage.create_exclusive(storage.join(url, "lease.json"), info.to_json())


def test_lease_names_its_holder_and_vanishes_on_release(url: str) -> None:
    assert holder(url) is None
    with Lease.acquire(url, **FAST) as lease:
        info = holder(url)
        assert info is not None
        assert (info.host, info.pid, info.owner) == (socket.gethostname(), os.getpid(), lease.info.owner)
        assert info.user
        assert info.command
        assert abs(info.age(time.time())) < 2
        lease.check()
    assert holder(url) is None
    assert storage.list_files(url) == []
    lease.release()
    with pytest.raises(LeaseError, match="was released by this driver"):
        lease.check()


def test_lease_is_released_when_its_driver_fails(url: str) -> None:
    with pytest.raises(ZeroDivisionError), Lease.acquire(url, **FAST):
        raise ZeroDivisionError
    assert storage.list_files(url) == []


def test_second_driver_is_refused_and_learns_who_holds_the_lease(url: str) -> None:
    with Lease.acquire(url, **FAST) as lease:
        with pytest.raises(LeaseError) as caught:
            Lease.acquire(url, **FAST)
        text = str(caught.value)
        assert text.startswith(f"another driver works on this store: pid {os.getpid()} of ")
        assert f" on {socket.gethostname()}, since {lease.info.started}, last heartbeat " in text
        assert "taken over 2 s after its last heartbeat" in text
        assert "\n" not in text
        lease.check()
    Lease.acquire(url, **FAST).release()


def test_heartbeat_is_renewed(url: str) -> None:
    with Lease.acquire(url, **FAST) as lease:
        first = holder(url)
        deadline = time.monotonic() + 10
        while (now := holder(url)) == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert first is not None
        assert now is not None
        assert now.heartbeat_epoch > first.heartbeat_epoch
        assert (now.owner, now.started) == (first.owner, first.started)
        lease.check()


def test_credentials_in_the_command_are_left_out(url: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.store.lease import Lease\n"
        "with Lease.acquire(sys.argv[1]) as lease: print(lease.info.command)"
    )
    arguments = ["--shards", "https://ann:secret@host/a.tar?X-Amz-Signature=abc"]
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), *arguments], capture_output=True, text=True, check=True
    )
    assert "https://host/a.tar" in run.stdout
    assert "secret" not in run.stdout
    assert "abc" not in run.stdout


def test_of_two_processes_that_start_at_once_one_gets_the_lease(drivers: list[Driver], tmp_path: Path) -> None:
    for attempt in range(20):
        for driver in drivers:
            driver.write(str(tmp_path / f"out{attempt}"))
        answers = {driver: driver.read() for driver in drivers}
        assert sorted(answer == "holds" for answer in answers.values()) == [False, True]
        winner, loser = sorted(drivers, key=lambda driver: answers[driver] != "holds")
        assert f"pid {winner.process.pid} of " in answers[loser]
        assert f" on {socket.gethostname()}, since " in answers[loser]
        winner.write()
        assert (winner.read(), winner.read()) == ("still holds", "released")


@needs_proc
def test_lease_of_a_killed_driver_is_taken_over_at_once(drivers: list[Driver], tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    first, second = drivers
    first.write(url)
    assert first.read() == "holds"
    first.process.kill()
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)  # ended, and its number still answers
    started = time.monotonic()
    second.write(url)
    assert second.read() == "holds"
    assert time.monotonic() - started < FAST["stale_after"]
    info = holder(url)
    assert info is not None
    assert info.pid == second.process.pid


def test_foreign_lease_that_is_stale_goes_to_one_of_many_contenders(url: str) -> None:
    write_lease(url, foreign(time.time() - 3600))
    together = threading.Barrier(8)

    def contend() -> Lease | LeaseError:
        together.wait()
        try:
            return Lease.acquire(url, **FAST)
        except LeaseError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        results = [future.result() for future in [pool.submit(contend) for _ in range(8)]]
    (lease,) = [result for result in results if isinstance(result, Lease)]
    lease.check()
    assert holder(url) is not None
    lease.release()
    for result in results:
        assert result is lease or f"pid {os.getpid()} of " in str(result)


def test_foreign_lease_with_a_young_heartbeat_is_respected(url: str) -> None:
    write_lease(url, foreign(time.time() - 1))
    with pytest.raises(
        LeaseError, match=r"pid 4711 of ann on far, since 2026-01-01T00:00:00\+00:00, last heartbeat 1 s ago"
    ):
        Lease.acquire(url, interval=0.2, stale_after=60)


@pytest.mark.parametrize("skew", [-3600.0, 3600.0], ids=["clock is late", "clock is early"])
def test_foreign_lease_that_is_renewed_is_respected_whatever_its_clock_says(url: str, skew: float) -> None:
    with Lease.acquire(url, **FAST, clock=lambda: time.time() + skew) as lease:
        info = dataclasses.replace(lease.info, machine="another")
        assert not info.process_is_gone
        with pytest.raises(LeaseError, match=f"pid {os.getpid()} "):
            Lease.acquire(url, **FAST)
        lease.check()


def test_foreign_lease_of_the_future_is_taken_over_when_it_does_not_change(url: str) -> None:
    write_lease(url, foreign(time.time() + 3600))
    started = time.monotonic()
    with Lease.acquire(url, **FAST) as lease:
        assert time.monotonic() - started >= FAST["stale_after"]
        lease.check()


def test_suspended_driver_loses_its_lease_and_does_not_write_it(drivers: list[Driver], tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    first, second = drivers
    first.write(url)
    assert first.read() == "holds"
    first.process.send_signal(signal.SIGSTOP)
    time.sleep(FAST["stale_after"] + 0.2)
    second.write(url)
    assert second.read() == "holds"
    first.process.send_signal(signal.SIGCONT)
    first.write()
    text = first.read()
    assert f"was taken over by pid {second.process.pid} of " in text
    assert f"this driver (pid {first.process.pid} on " in text
    time.sleep(0.5)
    info = holder(url)
    assert info is not None
    assert info.pid == second.process.pid
    second.write()
    assert (second.read(), second.read()) == ("still holds", "released")


def test_suspended_driver_notices_that_another_came_and_went(drivers: list[Driver], tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    first, second = drivers
    first.write(url)
    assert first.read() == "holds"
    first.process.send_signal(signal.SIGSTOP)
    time.sleep(FAST["stale_after"] + 0.2)
    second.write(url)
    assert second.read() == "holds"
    second.write()
    assert (second.read(), second.read()) == ("still holds", "released")
    first.process.send_signal(signal.SIGCONT)
    first.write()
    assert "lease.json is gone: this driver (pid " in first.read()
    assert holder(url) is None


def test_lease_removed_by_hand_is_written_again(url: str) -> None:
    with Lease.acquire(url, **FAST) as lease:
        storage.remove(lease.place)
        deadline = time.monotonic() + 10
        while (info := holder(url)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert info is not None
        assert info.owner == lease.info.owner
        lease.check()
    assert storage.list_files(url) == []


def test_lease_that_cannot_be_renewed_is_given_up(tmp_path: Path) -> None:
    now = 1e9
    lease = Lease.acquire(str(tmp_path / "out"), interval=20, stale_after=60, clock=lambda: now)
    lease.check()
    (tmp_path / "out").rename(tmp_path / "away")
    (tmp_path / "out").write_text("no folder")
    now += 50
    lease.check()
    now += 50
    with pytest.raises(LeaseError, match=r"could not be renewed for 1 min 40 s \(.*may have taken over this store"):
        lease.check()
    (tmp_path / "out").unlink()
    (tmp_path / "away").rename(tmp_path / "out")
    lease.check()
    lease.release()
    assert storage.list_files(str(tmp_path / "out")) == []


def test_lease_about_to_be_removed_is_waited_for(url: str) -> None:
    info = foreign(time.time(), released=True)
    write_lease(url, info)
    assert holder(url) is None
    timer = threading.Timer(0.5, storage.remove, [storage.join(url, "lease.json")])
    timer.start()
    with Lease.acquire(url, **FAST) as lease:
        lease.check()
    timer.join()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            b"",
            r"lease\.json is no lease \(JSONDecodeError: .*make sure that no driver works on this store",
        ),
        (b"[]", r"is no lease \(TypeError"),
        (b'{"version": 1}', r"is no lease \(TypeError"),
        (json.dumps({**dataclasses.asdict(foreign(0.0)), "version": 7, "new": 1}).encode(), "a newer program works on"),
    ],
    ids=["empty", "list", "fields", "version"],
)
def test_file_that_is_no_lease_is_refused(url: str, data: bytes, text: str) -> None:
    storage.write_atomic(storage.join(url, "lease.json"), data)
    with pytest.raises(LeaseError, match=text):
        Lease.acquire(url, **FAST)
    with pytest.raises(LeaseError, match=text):
        holder(url)
    assert storage.read_bytes(storage.join(url, "lease.json")) == data


def test_intervals_must_fit_into_the_time_a_lease_lasts(tmp_path: Path) -> None:
    for interval, stale_after in [(0, 1), (1, 2), (-1, 1)]:
        with pytest.raises(ValueError, match="three intervals or more"):
            Lease.acquire(str(tmp_path), interval=interval, stale_after=stale_after)


@needs_proc
def test_process_is_known_by_its_number_and_its_start() -> None:
    own = process_start(os.getpid())
    assert own
    assert not has_ended(os.getpid(), own)
    assert has_ended(os.getpid(), str(int(own) - 1))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = process_start(child.pid)
    assert not has_ended(child.pid, start)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and its number still answers
    assert has_ended(child.pid, start)
    child.communicate()
    assert has_ended(child.pid, start)
    assert process_start(child.pid) == ""

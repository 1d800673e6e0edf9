"""The lease of a store: one driver at a time, by a file ``OUT/lease.json`` that names it and is renewed while it works.

The file is created exclusively and renewed by conditional replacement: each write names the version that it replaces
(the ETag on object stores). So of several drivers that want a lease exactly one gets it, and a driver that was
suspended and lost its lease learns so from its next renewal and never overwrites the new holder's.

A lease is taken over

* at once where its holder ran on this machine since its last start and that process is gone;
* else where its heartbeat is older than ``stale_after`` seconds and does not change during two of the holder's
  intervals: clocks of two hosts may differ, and a holder that lives renews its lease whatever its clock says. Of a
  heartbeat in the future the age says nothing: that file is watched for the whole of ``stale_after``.
"""

import getpass
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from textwrap import shorten
from types import TracebackType
from typing import Any

from pipeline.console import human_seconds
from pipeline.errors import EnvironmentFault, LeaseError, PipelineError
from pipeline.inputs import storage
from pipeline.redaction import redact
from pipeline.store.processes import has_ended, process_start, this_machine

__all__ = ["Lease", "LeaseInfo", "holder"]

VERSION = 1
INTERVAL = 10.0
STALE_AFTER = 60.0
# Clocks of hosts that keep time differ by less; a heartbeat further in the future has no age.
_CLOCK_SKEW = 2.0
# Seconds that a released file may take to vanish before its holder counts as gone.
_RELEASE_GRACE = 10.0
_COMMAND_LENGTH = 1000


@dataclass(frozen=True)
class LeaseInfo:
    """What a lease file holds.

    ``started`` and ``heartbeat`` are UTC in ISO format by the holder's clock, ``heartbeat_epoch`` is the latter in
    seconds since 1970. ``interval`` is the seconds between two heartbeats. ``machine`` and ``process_start`` say which
    process ``pid`` is, see :mod:`pipeline.store.processes`. ``released``: the holder is about to remove the file.
    """

    owner: str
    host: str
    pid: int
    user: str
    command: str
    started: str
    heartbeat: str
    heartbeat_epoch: float
    interval: float
    machine: str = ""
    process_start: str = ""
    released: bool = False
    version: int = VERSION

    def to_json(self) -> bytes:
        """As kept in the file."""
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_json(data: bytes, place: str) -> "LeaseInfo":
        """What :meth:`to_json` wrote.

        Raises:
            LeaseError: the file ``place`` is damaged, or of a newer program.
        """
        names = {field.name for field in fields(LeaseInfo)}
        try:
            content: dict[str, Any] = json.loads(data)
            version = int(content["version"])
            info = LeaseInfo(**{name: value for name, value in content.items() if name in names})
            float(info.interval), float(info.heartbeat_epoch), int(info.pid), info.started_epoch
        except (ValueError, KeyError, TypeError) as error:
            raise LeaseError(
                f"{place} is no lease ({type(error).__name__}: {error}): the file is damaged; make sure that no driver "
                "works on this store, then remove it"
            ) from error
        if version > VERSION:
            raise LeaseError(
                f"{place} is a lease of version {version}, this program knows version {VERSION}: a newer program works "
                "on this store; wait for it to end, or use the newer program"
            )
        return info

    def age(self, now: float) -> float:
        """Seconds since the last heartbeat, of a reader whose clock says ``now``; negative: it lies in the future."""
        return now - self.heartbeat_epoch

    @property
    def process_is_gone(self) -> bool:
        """Whether the holder ran on this machine since its last start, and its process has ended."""
        return self.machine == this_machine() != "" and has_ended(self.pid, self.process_start)

    @property
    def started_epoch(self) -> float:
        """When the lease was taken, in seconds since 1970 by the holder's clock."""
        return datetime.fromisoformat(self.started).timestamp()

    def lives(self, now: float) -> bool:
        """Whether the holder renews its lease, as far as one look tells."""
        return self.age(now) < max(STALE_AFTER, 3 * self.interval) and not self.process_is_gone

    def text(self, now: float) -> str:
        """Who it is, in one line."""
        age = self.age(now)
        beat = f"{human_seconds(age)} ago" if age >= 0 else f"at {self.heartbeat}, in the future by this host's clock"
        return f"pid {self.pid} of {self.user} on {self.host}, since {self.started}, last heartbeat {beat}"


def holder(url: str) -> LeaseInfo | None:
    """Who holds the lease of the store ``url``, live or not; ``None`` where nobody does. Only reads.

    Raises:
        LeaseError: the file is damaged, or of a newer program.
    """
    place = _place(url)
    try:
        info = LeaseInfo.from_json(storage.read_bytes(place), place)
    except FileNotFoundError:
        return None
    return None if info.released else info


class Lease:
    """The right to write to a store, held until :meth:`release`; a context manager. See :meth:`acquire`."""

    def __init__(self, place: str, info: LeaseInfo, token: str, stale_after: float, clock: Callable[[], float]) -> None:
        self.place, self.info = place, info
        self._token, self._stale_after, self._clock = token, stale_after, clock
        self._lost = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        url: str,
        *,
        interval: float = INTERVAL,
        stale_after: float = STALE_AFTER,
        clock: Callable[[], float] = time.time,
    ) -> "Lease":
        """Take the lease of a store, and renew it in the background from now on.

        Args:
            url: the store, whose folder need not exist.
            interval: seconds between heartbeats.
            stale_after: seconds after which a heartbeat is stale; of a holder with longer intervals, three of those.
            clock: seconds since 1970.

        Raises:
            LeaseError: another driver holds the lease; the text names it.
        """
        if not 0 < 3 * interval <= stale_after:
            raise ValueError(f"stale_after must be three intervals or more, not {stale_after} s with {interval} s")
        place = _place(url)
        info = _own(interval)
        released_until: float | None = None
        while True:
            info = _renewed(info, clock())
            storage.create_exclusive(place, info.to_json())
            try:
                data, token = storage.read_with_token(place)
            except FileNotFoundError:
                continue  # released since
            found = LeaseInfo.from_json(data, place)
            if found.owner == info.owner:
                return cls(place, info, token, stale_after, clock)
            if found.released and not found.process_is_gone:
                released_until = released_until or time.monotonic() + _RELEASE_GRACE
                if time.monotonic() < released_until:
                    time.sleep(0.05)
                    continue
            elif not found.process_is_gone:
                _check_stale(place, found, stale_after, clock)
            info = _renewed(info, clock())
            # Of several contenders for one version of the file, the store lets one replace it.
            taken = storage.replace_if(place, info.to_json(), token)
            if taken is not None:
                return cls(place, info, taken, stale_after, clock)

    def check(self) -> None:
        """Return where the lease is still this driver's; to be called before each step that changes the store.

        Costs nothing while heartbeats succeed; where the last one is older than two intervals (this process was
        suspended, or the store does not answer), the lease is renewed first.

        Raises:
            LeaseError: it was taken over, or cannot be renewed for so long that it may have been.
        """
        if not self._lost and self.info.age(self._clock()) > 2 * self.info.interval:
            try:
                self._renew(timeout=self.info.interval)
            except OSError as error:
                silent = self.info.age(self._clock())
                if silent > self._stale_after:
                    raise LeaseError(
                        f"{self.place} could not be renewed for {human_seconds(silent)} ({error}), so another driver "
                        "may have taken over this store; run the same command again when the store can be reached"
                    ) from error
        if self._lost:
            raise LeaseError(self._lost)

    def release(self) -> None:
        """Stop the heartbeat and remove the file, where it is still this driver's. Again: nothing happens."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            if self._lost:
                return
            # Nobody takes over a lease marked so before its holder had the time to remove it: the file that is removed
            # is this one.
            self._replace(replace(self.info, released=True))
            if not self._lost:
                storage.remove(self.place)
                self._lost = f"{self.place} was released by this driver (pid {self.info.pid}) itself"

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except (OSError, EnvironmentFault) as problem:
            # What the driver did, or the error that ended it, counts for more.
            print(
                f"{self.place} could not be removed ({redact(str(problem))}); the next driver takes it over "
                f"{human_seconds(self._stale_after)} after the last heartbeat",
                file=sys.stderr,
            )

    def _beat(self) -> None:
        while not self._stop.wait(self.info.interval) and not self._lost:
            try:
                self._renew()
            except (OSError, PipelineError):
                # Tried again at the next beat; when that is overdue, check() tries as well and raises what goes wrong.
                continue

    def _renew(self, timeout: float = -1) -> None:
        if not self._lock.acquire(timeout=timeout):
            raise TimeoutError(f"the store does not answer a renewal for {human_seconds(timeout)}")
        try:
            if not self._lost:
                self._replace(self.info)
        finally:
            self._lock.release()

    def _replace(self, info: LeaseInfo) -> None:
        """Write ``info`` with a new heartbeat over this driver's last version of the file, or set ``_lost``."""
        now = self._clock()
        info = _renewed(info, now)
        for _ in range(3):
            token = storage.replace_if(self.place, info.to_json(), self._token)
            if token is not None:
                self._token, self.info = token, info
                return
            try:
                data, token = storage.read_with_token(self.place)
            except FileNotFoundError:
                # Until it is stale nobody takes it over, so nobody had it since: it was removed by hand.
                if self.info.age(now) < self._stale_after and storage.create_exclusive(self.place, info.to_json()):
                    continue
                self._lost = f"{self.place} is gone: {self._silence(now)}; run the same command again"
                return
            found = LeaseInfo.from_json(data, self.place)
            if found.owner != info.owner:
                self._lost = f"{self.place} was taken over by {found.text(now)}: {self._silence(now)}; this one stops"
                return
            # The answer to an earlier write was lost on its way: the version there is this driver's own.
            self._token = token
        raise OSError(f"{self.place} cannot be renewed: it is this driver's, and three conditional writes were refused")

    def _silence(self, now: float) -> str:
        return (
            f"this driver (pid {self.info.pid} on {self.info.host}), whose last heartbeat was "
            f"{human_seconds(self.info.age(now))} ago, was suspended or cut off, or the file was removed by hand, and "
            "another driver may have written to the store since"
        )


def _check_stale(place: str, found: LeaseInfo, stale_after: float, clock: Callable[[], float]) -> None:
    """Return where the holder ``found`` is gone by its heartbeat.

    Raises:
        LeaseError: it lives.
    """
    stale_after = max(stale_after, 3 * found.interval)
    age = found.age(clock())
    if -_CLOCK_SKEW <= age < stale_after:
        raise LeaseError(_refusal(place, found, stale_after, clock()))
    patience = stale_after if age < 0 else min(stale_after, 2 * found.interval)
    print(
        f"{place} is held by {found.text(clock())}: watching for {human_seconds(patience)} whether it is renewed",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + patience
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 1.0, patience / 8))
        try:
            now_there = LeaseInfo.from_json(storage.read_with_token(place)[0], place)
        except FileNotFoundError:
            return
        if now_there != found:
            if now_there.released:
                return
            raise LeaseError(_refusal(place, now_there, stale_after, clock()))


def _refusal(place: str, found: LeaseInfo, stale_after: float, now: float) -> str:
    return (
        f"another driver works on this store: {found.text(now)} ({shorten(found.command, 200)}); wait for it to end, "
        "or stop it there. If that process is gone, run this command again: its lease is taken over "
        f"{human_seconds(stale_after)} after its last heartbeat; never remove {place} by hand while it runs"
    )


def _place(url: str) -> str:
    return storage.join(url, "lease.json")


def _own(interval: float) -> LeaseInfo:
    """A lease of this process, without a heartbeat yet."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid {os.getuid()}"
    pid = os.getpid()
    return LeaseInfo(
        owner=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=pid,
        user=user,
        command=shorten(shlex.join(map(redact, sys.argv)), _COMMAND_LENGTH),
        started="",
        heartbeat="",
        heartbeat_epoch=0.0,
        interval=interval,
        machine=this_machine(),
        process_start=process_start(pid),
    )


def _renewed(info: LeaseInfo, now: float) -> LeaseInfo:
    """The lease with a heartbeat at ``now``, in seconds since 1970; with its first one it has started."""
    time_text = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    return replace(info, started=info.started or time_text, heartbeat=time_text, heartbeat_epoch=now)

"""Joins a Ray cluster, or starts Ray on this machine; says in one line what keeps it from doing so."""

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.data

from pipeline.errors import ConfigError, EnvironmentFault

__all__ = ["check_address", "connect", "short_temporary_folder"]

# A Unix socket's path has at most 107 bytes, of which Ray's own part takes this many.
_SOCKET_PATH = 107
_SESSION_PATH = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_CONNECT_SECONDS = 60.0


def connect(object_store_mb: int, logs: ray.LoggingConfig | None = None) -> None:
    """Join the cluster that ``RAY_ADDRESS`` or ``ray job submit`` names, or start Ray on this machine.

    Args:
        object_store_mb: memory of Ray's object store where it is started here, in MiB.
        logs: what the loggers of all processes are set to; by default as Ray does.

    Raises:
        ConfigError: nothing answers at ``RAY_ADDRESS``.
        EnvironmentFault: Ray cannot be started here: no folder for its files, or no answer within a minute.
    """
    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)
        address = os.environ.get("RAY_ADDRESS")
        if address:
            check_address(address)
            with _within(_CONNECT_SECONDS, f"joining the cluster at {address}"):
                ray.init(logging_level=logging.WARNING, logging_config=logs)
        else:
            folder = short_temporary_folder(tempfile.gettempdir())
            _tell_of_small_shared_memory(object_store_mb)
            if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"} & os.environ.keys():
                # This Ray is of this process alone. Ray itself would keep its token in a home folder, which may not be
                # one that can be written to, and warn at every start that there is one.
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
                logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
            with _within(_CONNECT_SECONDS, "starting Ray on this machine"):
                ray.init(
                    address="local",
                    object_store_memory=object_store_mb << 20,
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    logging_config=logs,
                    _temp_dir=folder,
                )
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler prints a native stack trace and aborts the process.
            signal.signal(signal.SIGTERM, handler)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # A block that fails is a fault of the program: units that fail come back as receipts that say so.
    context.max_errored_blocks = 0
    # An actor that cannot start is tried again, here and then in a new process, before the job gives up.
    context.actor_init_retry_on_errors = True
    context.max_consecutive_actor_init_deaths = 3
    # Ray would walk the page tables of every worker each second to report its memory.
    context.memory_usage_poll_interval_s = None
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def check_address(address: str, seconds: float = 10.0) -> None:
    """Raise ConfigError where nothing listens at a cluster's address; Ray itself would try for ten minutes."""
    if address in ("auto", "local"):
        return
    place = address.rpartition("://")[2].partition("/")[0]
    host, _, port = place.rpartition(":")
    cure = (
        "start the cluster (ray start --head), give the address that `ray start` printed, or unset RAY_ADDRESS to run "
        "on this machine"
    )
    if not host or not port.isdecimal():
        raise ConfigError(f"RAY_ADDRESS={address!r} is no HOST:PORT; {cure}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError as error:
        raise ConfigError(f"RAY_ADDRESS={address!r}: no Ray cluster answers there ({error}); {cure}") from error


def short_temporary_folder(folder: str) -> str | None:
    """A folder for Ray's files: ``None`` (Ray's own choice) where its sockets' paths fit below ``folder``.

    Raises:
        EnvironmentFault: neither ``folder`` nor a shorter one can be written to.
    """
    if not _is_writable(folder):
        raise EnvironmentFault(f"the folder for temporary files, {folder}, cannot be written to; set TMPDIR to another")
    if len(os.fsencode(folder)) + _SESSION_PATH <= _SOCKET_PATH:
        return None
    for short in (f"/tmp/ray-{os.getuid()}", f"/dev/shm/ray-{os.getuid()}"):
        if _is_writable(str(Path(short).parent)):
            return short
    raise EnvironmentFault(
        f"TMPDIR={folder} is too long for Ray's sockets (paths of at most {_SOCKET_PATH} bytes) and /tmp cannot be "
        "written to; set TMPDIR to a shorter folder"
    )


def _is_writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _tell_of_small_shared_memory(object_store_mb: int) -> None:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = 0
    if free < object_store_mb << 20:
        print(
            f"/dev/shm has {free >> 20} MiB free, Ray's object store wants {object_store_mb} MiB and goes to disk, "
            "which is slower; run a container with --shm-size, or give a smaller --object-store-mb",
            flush=True,
        )


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """End the process with one line where something hangs that cannot be interrupted, as Ray's start can."""

    def end() -> None:
        print(
            f"EnvironmentFault: {what} took longer than {seconds:.0f} s; look at the logs under "
            f"{tempfile.gettempdir()}/ray and at the cluster's head node (ray status), and run the same command again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    watch = threading.Timer(seconds, end)
    watch.daemon = True
    watch.start()
    try:
        yield
    except Exception as error:  # Ray raises bare ones, where a node does not come up in time for instance
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise EnvironmentFault(f"{what} failed: {first}") from error
    finally:
        watch.cancel()

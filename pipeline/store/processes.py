"""Which process a number belongs to: numbers are used again, after its end and on every other machine."""

import os

__all__ = ["has_ended", "process_start", "this_machine"]


def this_machine() -> str:
    """The start of this system and the namespace that its process numbers belong to; '' where the system tells neither.

    Two containers of one host share the former and number their processes apart.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process of this machine began, in ticks since the system did; '' where /proc does not tell."""
    return _state_and_start(pid)[1]


def has_ended(pid: int, start: str) -> bool:
    """Whether the process ``pid`` of this machine that began at ``start`` has ended, reaped by its parent or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, which exists
    state, found = _state_and_start(pid)
    # Where /proc hides other users' processes, one that answers to its number counts as the same.
    return bool(found) and (state in "ZX" or found != start)


def _state_and_start(pid: int) -> tuple[str, str]:
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name before them, in brackets, may hold anything.
            values = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return "", ""
    return values[0], values[19]

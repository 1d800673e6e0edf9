"""Ctrl-C and SIGTERM end a job in seconds, with one line."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "stopping_on_signals"]


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, by Ctrl-C or SIGTERM. ``exit_status`` is 130 or 143, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Within it, SIGINT and SIGTERM raise :class:`Stopped` in the main thread; a second one ends the process as usual.

    Elsewhere than in the main thread nothing changes: Python delivers signals there alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        raise Stopped(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Progress of long work: one live line on a terminal, else a line now and then, at least every half minute."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, TextIO

from pipeline.console import human_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["CountProgress", "LineProgress", "is_live"]

_FRAME_SECONDS = 0.25


def is_live(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a line can be drawn anew."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class LineProgress:
    """Shows how far work is: by :meth:`line` in a log, by :meth:`short` behind a bar on a terminal.

    As a context manager it also shows where nothing comes in: what is waited for, and since when. What the work prints
    meanwhile goes above the live line; leaving the block, also by an error, gives the terminal back.
    """

    def __init__(self, total: int, stream: TextIO | None, every: float, clock: Callable[[], float], silence: float):
        """
        Args:
            total: how many parts the work has.
            stream: where lines go, by default the standard output; a terminal is told by its ``isatty``.
            every: seconds between lines in a log.
            clock: tells the seconds, from any beginning.
            silence: seconds after which a line is printed though nothing came in.
        """
        self.total, self.done = total, 0
        self._stream = stream or sys.stdout
        self._live = is_live(self._stream)
        self._every = _FRAME_SECONDS if self._live else every
        self._silence = 1.0 if self._live else silence
        self._clock = clock
        self.started = self._shown = clock()
        self._bar: Progress | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def line(self, now: float) -> str:
        """The state in one line of a log."""
        raise NotImplementedError

    def short(self, now: float) -> str:
        """The state in about sixty letters."""
        raise NotImplementedError

    def waiting(self, now: float) -> str:
        """What is waited for where nothing comes in."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self._live:
            self._bar = self._open_bar()
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._ticker.join()
        if self._bar is not None:
            self._show(self._clock())
            self._bar.stop()

    def _open_bar(self) -> "Progress":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        bar = Progress(
            BarColumn(bar_width=16),
            # Cut where the terminal is narrow: a second line would stay behind.
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=Console(file=self._stream, markup=False, highlight=False),
            refresh_per_second=1 / _FRAME_SECONDS,
            # A stream that goes to a file stays there.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        bar.add_task(self.short(self._clock()), total=self.total)
        bar.start()
        return bar

    def _tick(self) -> None:
        while not self._ended.wait(min(1.0, self._silence / 4)):
            self.tick()

    def tick(self) -> None:
        """Show the state where it was not shown for ``silence`` seconds."""
        with self._lock:
            now = self._clock()
            if now - self._shown >= self._silence and self.done < self.total:
                self._show(now, f"; {self.waiting(now)}")

    def came(self, now: float) -> None:
        """Show the state after some more is done, where it is time; called with the lock held."""
        if now - self._shown >= self._every or self.done == self.total:
            self._show(now)

    def _show(self, now: float, waiting: str = "") -> None:
        self._shown = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, description=self.short(now))
        elif not self._live:
            self._stream.write(f"{self.line(now)}{waiting}\n")
            self._stream.flush()


class CountProgress(LineProgress):
    """Counts parts of one kind."""

    def __init__(
        self,
        total: int,
        noun: str,
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        silence: float = 30.0,
        before: int = 0,
    ) -> None:
        """
        Args:
            total, stream, every, clock, silence: see :class:`LineProgress`.
            noun: what is counted, in the plural.
            before: how many were done before, which tell nothing of the pace.
        """
        super().__init__(total, stream, every, clock, silence)
        self.noun = noun
        self.done = self._before = before
        self._remark = ""
        self._last = self.started

    def reach(self, done: int, remark: str = "") -> None:
        """So many are done now, of all; a remark follows the numbers."""
        with self._lock:
            self._last = now = self._clock()
            self.done, self._remark = done, remark
            self.came(now)

    def line(self, now: float) -> str:
        """The state in one line of a log."""
        return f"{self._counts(now)}  {human_seconds(now - self.started)} gone, {self._left(now)} left"

    def short(self, now: float) -> str:
        """The state in about sixty letters."""
        return f"{self._counts(now)}  {self._left(now)} left"

    def waiting(self, now: float) -> str:
        """What is waited for where nothing comes in."""
        return f"the last of the {self.noun} came {human_seconds(now - self._last)} ago"

    def _pace(self, now: float) -> float:
        return (self.done - self._before) / max(now - self.started, 1e-9)

    def _counts(self, now: float) -> str:
        remark = f"  {self._remark}" if self._remark else ""
        return f"{self.done}/{self.total} {self.noun}{remark}  {self._pace(now):.1f} {self.noun}/s"

    def _left(self, now: float) -> str:
        pace = self._pace(now)
        return human_seconds((self.total - self.done) / pace) if pace else "unknown"

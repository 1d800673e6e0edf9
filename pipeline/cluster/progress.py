"""Progress of a run, readable on a terminal and in a log file alike; never silent for longer than half a minute."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Self, TextIO

from pipeline.console import human_bytes, human_seconds
from pipeline.store.ledger import Receipt

__all__ = ["Progress"]


class Progress:
    """Counts receipts as they come in and prints a line now and then: over itself on a terminal, else below.

    As a context manager it also prints where nothing comes in: what is waited for, and since when.
    """

    def __init__(
        self,
        units: int,
        samples: int,
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        silence: float = 30.0,
    ) -> None:
        """
        Args:
            units, samples: what this run has to do.
            stream: where lines go, by default the standard output; a terminal is told by its ``isatty``.
            every: seconds between lines in a log; a terminal gets two a second.
            clock: tells the seconds, from any beginning.
            silence: seconds after which a line is printed though nothing came in.
        """
        self.units, self.samples = units, samples
        self.done_units = self.failed_units = self.done_samples = self.failed_samples = self.bytes = 0
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._every = 0.5 if self._terminal else every
        self._silence = silence
        self._clock = clock
        self._started = clock()
        self._first: float | None = None
        self._samples_at_first = 0
        self._shown = self._last = self._started
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._ticker.join()

    def _tick(self) -> None:
        while not self._ended.wait(min(1.0, self._silence / 4)):
            self.tick()

    def add(self, receipt: Receipt) -> None:
        """Count one unit."""
        with self._lock:
            self.done_units += 1
            self.failed_units += bool(receipt.error)
            self.done_samples += len(receipt.samples)
            self.failed_samples += sum(record.status != "ok" for record in receipt.samples)
            self.bytes += receipt.sizes.get("encode_write", 0)
            now = self._last = self._clock()
            if self._first is None:
                self._first, self._samples_at_first = now, self.done_samples
            if now - self._shown >= self._every or self.done_units == self.units:
                self._print(self.line(now), now)

    def tick(self) -> None:
        """Print a line where none was printed for ``silence`` seconds."""
        with self._lock:
            now = self._clock()
            if now - self._shown >= self._silence and self.done_units < self.units:
                self._print(f"{self.line(now)}; {self.waiting(now)}", now)

    def waiting(self, now: float) -> str:
        """What is waited for."""
        if self._first is None:
            return "waiting for the first unit: processes start, load the models, read and decode"
        return f"waiting for a unit, the last one came {human_seconds(now - self._last)} ago"

    def _print(self, text: str, now: float) -> None:
        self._shown = now
        end = "\r" if self._terminal and self.done_units < self.units else "\n"
        self._stream.write(("\x1b[2K" if self._terminal else "") + text + end)
        self._stream.flush()

    def line(self, now: float) -> str:
        """The state in one line."""
        elapsed = max(now - self._started, 1e-9)
        # The start of processes is not part of the pace, so the time left is computed from the first unit on.
        pace = self.done_samples / elapsed
        if self._first is not None and now - self._first > 5 and self.done_samples > self._samples_at_first:
            pace = (self.done_samples - self._samples_at_first) / (now - self._first)
        left = human_seconds((self.samples - self.done_samples) / pace) if pace else "unknown"
        failed = f"{self.failed_samples} samples failed" + (
            f", {self.failed_units} units failed" if self.failed_units else ""
        )
        return (
            f"{self.done_units}/{self.units} units  {self.done_samples}/{self.samples} samples  "
            f"{pace:.1f} samples/s  {human_bytes(self.bytes / elapsed)}/s  {failed}  "
            f"{human_seconds(elapsed)} gone, {left} left"
        )

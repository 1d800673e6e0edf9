"""Progress of a run, readable on a terminal and in a log file alike."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from pipeline.console import human_bytes, human_seconds
from pipeline.store.ledger import Receipt

__all__ = ["Progress"]


class Progress:
    """Counts receipts as they come in and prints a line now and then: over itself on a terminal, else below."""

    def __init__(
        self,
        units: int,
        samples: int,
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            units, samples: what this run has to do.
            stream: where lines go, by default the standard output; a terminal is told by its ``isatty``.
            every: seconds between lines in a log; a terminal gets two a second.
            clock: tells the seconds, from any beginning.
        """
        self.units, self.samples = units, samples
        self.done_units = self.failed_units = self.done_samples = self.failed_samples = self.bytes = 0
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._every = 0.5 if self._terminal else every
        self._clock = clock
        self._started = clock()
        self._first: float | None = None
        self._counted_at_first = 0
        self._shown = self._started

    def add(self, receipt: Receipt) -> None:
        """Count one unit."""
        self.done_units += 1
        self.failed_units += bool(receipt.error)
        self.done_samples += len(receipt.samples)
        self.failed_samples += sum(record.status != "ok" for record in receipt.samples)
        self.bytes += receipt.sizes.get("encode_write", 0)
        now = self._clock()
        if self._first is None:
            self._first, self._counted_at_first = now, self.done_samples
        if now - self._shown >= self._every or self.done_units == self.units:
            self._shown = now
            end = "\r" if self._terminal and self.done_units < self.units else "\n"
            self._stream.write(("\x1b[2K" if self._terminal else "") + self.line(now) + end)
            self._stream.flush()

    def line(self, now: float) -> str:
        """The state in one line."""
        elapsed = max(now - self._started, 1e-9)
        # The start of processes is not part of the pace, so time left is told from the first unit on.
        pace = self.done_samples / elapsed
        if self._first is not None and now - self._first > 5 and self.done_samples > self._counted_at_first:
            pace = (self.done_samples - self._counted_at_first) / (now - self._first)
        left = human_seconds((self.samples - self.done_samples) / pace) if pace else "unknown"
        failed = f"{self.failed_samples} samples failed" + (
            f", {self.failed_units} units failed" if self.failed_units else ""
        )
        return (
            f"{self.done_units}/{self.units} units  {self.done_samples}/{self.samples} samples  "
            f"{pace:.1f} samples/s  {human_bytes(self.bytes / elapsed)}/s  {failed}  "
            f"{human_seconds(elapsed)} gone, {left} left"
        )

"""Progress of a run of the main job."""

import time
from collections.abc import Callable
from typing import TextIO

from pipeline.console import human_bytes, human_seconds
from pipeline.progress import LineProgress
from pipeline.store.ledger import Receipt

__all__ = ["Progress"]


class Progress(LineProgress):
    """Counts receipts as they come in."""

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
            stream, every, clock, silence: see :class:`LineProgress`.
        """
        super().__init__(units, stream, every, clock, silence)
        self.samples = samples
        self.failed_units = self.done_samples = self.failed_samples = self.bytes = 0
        self._first: float | None = None
        self._samples_at_first = 0
        self._last = self.started

    def add(self, receipt: Receipt) -> None:
        """Count one unit."""
        with self._lock:
            self.done += 1
            self.failed_units += bool(receipt.error)
            self.done_samples += len(receipt.samples)
            self.failed_samples += sum(record.status != "ok" for record in receipt.samples)
            self.bytes += receipt.sizes.get("encode_write", 0)
            now = self._last = self._clock()
            if self._first is None:
                self._first, self._samples_at_first = now, self.done_samples
            self.came(now)

    def waiting(self, now: float) -> str:
        """What is waited for."""
        if self._first is None:
            return "waiting for the first unit: processes start, load the models, read and decode"
        return f"waiting for a unit, the last one came {human_seconds(now - self._last)} ago"

    def _pace(self, now: float) -> float:
        """Samples a second."""
        # The start of processes is not part of the pace, so the time left is computed from the first unit on.
        if self._first is not None and now - self._first > 5 and self.done_samples > self._samples_at_first:
            return (self.done_samples - self._samples_at_first) / (now - self._first)
        return self.done_samples / max(now - self.started, 1e-9)

    def _left(self, now: float) -> str:
        pace = self._pace(now)
        return human_seconds((self.samples - self.done_samples) / pace) if pace else "unknown"

    def line(self, now: float) -> str:
        """The state in one line."""
        elapsed = max(now - self.started, 1e-9)
        failed = f"{self.failed_samples} samples failed" + (
            f", {self.failed_units} units failed" if self.failed_units else ""
        )
        return (
            f"{self.done}/{self.total} units  {self.done_samples}/{self.samples} samples  "
            f"{self._pace(now):.1f} samples/s  {human_bytes(self.bytes / elapsed)}/s  {failed}  "
            f"{human_seconds(elapsed)} gone, {self._left(now)} left"
        )

    def short(self, now: float) -> str:
        """The state in about sixty letters."""
        if self._first is None:
            return f"0/{self.total} units  processes start and load the models, {human_seconds(now - self.started)}"
        units = f", {self.failed_units} units" if self.failed_units else ""
        return (
            f"{self.done}/{self.total} units  {self._pace(now):.1f} samples/s  "
            f"{self.failed_samples} failed{units}  {self._left(now)} left"
        )

"""Progress of a training run."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from pipeline.console import human_seconds

__all__ = ["StepProgress"]


class StepProgress:
    """Counts the steps of a training and prints a line now and then."""

    def __init__(
        self,
        done: int,
        steps: int,
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            done: steps that were done before.
            steps: how many there are in all.
            stream: where lines go, by default the standard output.
            every: seconds between lines.
            clock: tells the seconds, from any beginning.
        """
        self.steps = steps
        self._first, self._every = done, every
        self._stream, self._clock = stream or sys.stdout, clock
        self._started = self._shown = clock()

    def add(self, step: int, loss: float) -> None:
        """Tell of one step."""
        now = self._clock()
        if now - self._shown >= self._every or step == self.steps:
            self._shown = now
            pace = (step - self._first) / max(now - self._started, 1e-9)
            self._stream.write(
                f"step {step}/{self.steps}  loss {loss:.4g}  {pace:.2f} steps/s  "
                f"{human_seconds(now - self._started)} gone, {human_seconds((self.steps - step) / pace)} left\n"
            )
            self._stream.flush()

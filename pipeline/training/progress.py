"""Lines of progress that a training run prints."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from pipeline.console import human_seconds

__all__ = ["StepProgress", "print_line"]


class StepProgress:
    """Counts the steps of a training run and prints a line every few seconds."""

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
            done: Steps that were done before.
            steps: Steps of the whole run.
            stream: Where lines go, by default the standard output.
            every: Seconds between lines.
            clock: Seconds from an arbitrary beginning.
        """
        self.steps = steps
        self._first, self._every = done, every
        self._stream, self._clock = stream or sys.stdout, clock
        self._started = self._printed = clock()

    def add(self, step: int, loss: float) -> None:
        """Count a step with its loss."""
        now = self._clock()
        if now - self._printed >= self._every or step == self.steps:
            self._printed = now
            pace = (step - self._first) / max(now - self._started, 1e-9)
            self._stream.write(
                f"step {step}/{self.steps}  loss {loss:.4g}  {pace:.2f} steps/s  "
                f"{human_seconds(now - self._started)} gone, {human_seconds((self.steps - step) / pace)} left\n"
            )
            self._stream.flush()


def print_line(text: str) -> None:
    """Write a line to the standard output at once; what Ray Train's workers ``print`` comes out twice."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

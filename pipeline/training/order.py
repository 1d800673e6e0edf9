"""The order of the samples in a training run: which are held out, and which sample comes at which position."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.inputs.spread import spread_place
from pipeline.training.permutation import KeyedPermutation

__all__ = ["SampleOrder", "count_held_out"]

# Of a share: fewer tell little, and more take long to evaluate.
_FEWEST, _MOST = 16, 128


def count_held_out(holdout: float, samples: int) -> int:
    """How many samples the option ``holdout`` leaves out of a plan of ``samples``.

    A share, below 1, is of 16 to 128 samples, but of a quarter at most, and of one at least; other numbers are counts.
    """
    if holdout >= 1:
        return int(holdout)
    return max(1, min(max(_FEWEST, round(holdout * samples)), _MOST, samples // 4))


@dataclass(frozen=True)
class SampleOrder:
    """A permutation for each epoch of all samples that are not held out; takes no memory, however many there are.

    ``samples`` in the plan, of which ``holdout``, spread evenly over it, are left out; ``seed`` decides the order.

    Raises:
        InputError: nothing is left to train on.
    """

    samples: int
    holdout: int
    seed: int

    def __post_init__(self) -> None:
        if self.holdout >= self.samples:
            raise InputError(
                f"{self.samples} samples with holdout={self.holdout}: nothing is left to train on; give more shards, "
                "or hold out fewer"
            )

    def __len__(self) -> int:
        return self.samples - self.holdout

    def held_out(self) -> list[int]:
        """Numbers in the plan of the samples that are held out, ascending."""
        return [self._held_out(place) for place in range(self.holdout)]

    def candidates(self, position: int) -> Iterator[int]:
        """The number in the plan of the sample at ``position``, then those of the samples that may replace it.

        Positions count from the first image of the first step on. Each sample of the epoch comes once; a sample is
        replaced by those that follow it in the epoch.
        """
        epoch, place = divmod(position, len(self))
        order = KeyedPermutation(len(self), (self.seed, epoch))
        for offset in range(len(self)):
            rank = order[(place + offset) % len(self)]
            # The number of held-out samples before the one of this rank among the others.
            skipped = bisect_right(range(self.holdout), rank, key=lambda held: self._held_out(held) - held)
            yield rank + skipped

    def _held_out(self, place: int) -> int:
        return spread_place(place, self.holdout, self.samples)

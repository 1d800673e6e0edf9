"""Which sample is used in which step, and its image, decoded ahead of time."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.load import load_sample
from pipeline.decode.options import DecodeOptions
from pipeline.errors import InputError, SampleError
from pipeline.inputs.plan import Plan

__all__ = ["SampleOrder", "load_draw", "step_batches"]


_STEPS_AHEAD = 4


@dataclass(frozen=True)
class SampleOrder:
    """Which sample is drawn when: a permutation for each epoch of all samples that are not held out.

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
        return [(2 * place + 1) * self.samples // (2 * self.holdout) for place in range(self.holdout)]

    def drawn(self, position: int) -> Iterator[int]:
        """The number in the plan of what is drawn at ``position``, and those that stand in for it, the next first.

        Positions count from the first image of the first step on. Each sample of the epoch comes once.
        """
        epoch, place = divmod(position, len(self))
        order = _permutation(len(self), self.seed, epoch)
        held_out = np.array(self.held_out(), np.int64)
        before = held_out - np.arange(self.holdout)
        for offset in range(len(self)):
            number = int(order[(place + offset) % len(self)])
            yield number + int(np.searchsorted(before, number, side="right"))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True, eq=False)
class Draw:
    """An image, uint8 ``[H, W, 3]``, and why others, by their number in the plan, could not be had in its place."""

    image: NDArray[np.uint8]
    failures: dict[int, str]


def load_draw(plan: Plan, numbers: Iterable[int], options: DecodeOptions) -> Draw:
    """The first of some samples that can be decoded.

    Raises:
        InputError: none can.
    """
    failures: dict[int, str] = {}
    for number in numbers:
        shard, position = plan.sample(number)
        index = plan.index(shard)
        try:
            return Draw(load_sample(index, position, options).image, failures)
        except SampleError as error:
            failures[number] = f"{index.samples[position].key} of {plan.shards[shard].url}: {error}"
    raise InputError(
        f"not one of {len(failures)} samples can be decoded: {'; '.join(list(failures.values())[:3])}; look at the "
        "shards"
    )


def step_batches(
    plan: Plan, order: SampleOrder, options: DecodeOptions, batch: int, share: range, steps: range, threads: int
) -> Iterator[list[Draw]]:
    """The images of one worker, step by step, decoded ahead of time.

    Args:
        plan, order, options: Where the samples are, how they follow each other, and how they are decoded.
        batch: Images in a step, over all workers.
        share: This worker's places in it.
        steps: The steps to do, counted from 1.
        threads: Decode so many images at once.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[list[Future[Draw]]] = deque()
        try:
            for step in steps:
                places = [(step - 1) * batch + place for place in share]
                pending.append([pool.submit(load_draw, plan, order.drawn(place), options) for place in places])
                if len(pending) > _STEPS_AHEAD:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)

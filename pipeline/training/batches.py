"""The images of each training step, decoded ahead of time."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.load import load_sample
from pipeline.decode.options import DecodeOptions
from pipeline.errors import InputError, SampleError
from pipeline.inputs.plan import Plan
from pipeline.training.order import SampleOrder

__all__ = ["TrainingImage", "load_image", "step_batches"]


_STEPS_AHEAD = 4


@dataclass(frozen=True, eq=False)
class TrainingImage:
    """An image, uint8 ``[H, W, 3]``, and why samples before it could not be decoded, by their number in the plan."""

    image: NDArray[np.uint8]
    failures: dict[int, str]


def load_image(plan: Plan, candidates: Iterable[int], options: DecodeOptions) -> TrainingImage:
    """Decode the first of these samples that can be decoded.

    Raises:
        InputError: none of them can.
    """
    failures: dict[int, str] = {}
    for number in candidates:
        shard, position = plan.sample(number)
        index = plan.index(shard)
        try:
            return TrainingImage(load_sample(index, position, options).image, failures)
        except SampleError as error:
            failures[number] = f"{index.samples[position].key} of {plan.shards[shard].url}: {error}"
    raise InputError(
        f"not one of {len(failures)} samples can be decoded: {'; '.join(list(failures.values())[:3])}; look at the "
        "shards"
    )


def step_batches(
    plan: Plan, order: SampleOrder, options: DecodeOptions, batch: int, share: range, steps: range, threads: int
) -> Iterator[list[TrainingImage]]:
    """The images of one worker, step by step, decoded ahead of time.

    Args:
        plan, order, options: Where the samples are, how they follow each other, and how they are decoded.
        batch: Images in a step, over all workers.
        share: This worker's places in it.
        steps: The steps to do, counted from 1.
        threads: How many images are decoded at once.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[list[Future[TrainingImage]]] = deque()
        try:
            for step in steps:
                positions = [(step - 1) * batch + place for place in share]
                pending.append([pool.submit(load_image, plan, order.candidates(at), options) for at in positions])
                if len(pending) > _STEPS_AHEAD:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)

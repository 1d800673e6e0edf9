"""The order of the samples in a training run."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.training.order import SampleOrder, count_held_out


@pytest.mark.parametrize(("samples", "holdout"), [(2, 1), (9, 2), (10, 3), (101, 17), (1000, 999)])
def test_an_epoch_is_every_sample_that_is_not_held_out(samples: int, holdout: int) -> None:
    order = SampleOrder(samples, holdout, seed=3)
    held_out = order.held_out()
    assert len(set(held_out)) == holdout
    assert held_out == sorted(held_out)
    assert max(np.diff([0, *held_out, samples])) <= 2 * (samples / holdout + 1), "not spread"
    for epoch in (0, 1, 5):
        epoch_samples = [next(order.candidates(epoch * len(order) + place)) for place in range(len(order))]
        assert sorted([*epoch_samples, *held_out]) == list(range(samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        order = SampleOrder(40, 4, seed)
        return [next(order.candidates(number * 36 + place)) for place in range(36)]

    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(epoch(number, seed)) for number in (0, 1, 2) for seed in (0, 1)}) == 6


def test_replacements_are_the_next_of_the_epoch() -> None:
    order = SampleOrder(9, 2, seed=3)
    epoch = [next(order.candidates(7 + place)) for place in range(7)]
    assert list(order.candidates(7 + 5)) == [*epoch[5:], *epoch[:5]]


def test_something_must_be_left_to_train_on() -> None:
    with pytest.raises(InputError, match="32 samples with holdout=32: nothing is left to train on; give more shards"):
        SampleOrder(32, 32, 0)


@given(samples=st.integers(2, 300), data=st.data())
def test_an_epoch_has_all_other_samples_once(samples: int, data: st.DataObject) -> None:
    holdout = data.draw(st.integers(1, samples - 1))
    order = SampleOrder(samples, holdout, data.draw(st.integers(0, 2**32 - 1)))
    assert sorted([*order.candidates(3 * len(order)), *order.held_out()]) == list(range(samples))


def test_an_order_of_a_hundred_million_samples_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        order = SampleOrder(10**8, 1000, seed=1)
        numbers = [next(order.candidates(position)) for position in (0, 1, len(order) - 1, len(order), 10**12)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(numbers)) == 5
    assert all(0 <= number < 10**8 for number in numbers)
    assert peak < 100_000, "a permutation of all samples would take 800 MB"


def test_the_first_samples_of_an_epoch_are_spread_over_the_set() -> None:
    order = SampleOrder(10**6, 100, seed=5)
    tenths = np.bincount([next(order.candidates(position)) // 10**5 for position in range(2000)], minlength=10)
    assert len(tenths) == 10
    assert (abs(tenths - 200) < 60).all()


@pytest.mark.parametrize(
    ("holdout", "samples", "count"),
    [
        (0.1, 591, 59),
        (0.1, 100, 16),
        (0.1, 12, 3),
        (0.1, 2, 1),
        (0.1, 10**6, 128),
        (0.5, 100, 25),
        (3, 5, 3),
        (3.0, 5, 3),
        (1, 5, 1),
    ],
)
def test_a_share_is_held_out_within_bounds_and_a_count_as_it_is(holdout: float, samples: int, count: int) -> None:
    """32 were held out of any number: nothing was left of thirty photographs."""
    assert count_held_out(holdout, samples) == count

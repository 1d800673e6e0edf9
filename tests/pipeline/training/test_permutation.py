"""Permutations computed value by value."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.permutation import KeyedPermutation


@given(length=st.integers(1, 700), key=st.tuples(st.integers(0, 2**64), st.integers(0, 1000)))
def test_a_permutation_has_every_value_once(length: int, key: tuple[int, int]) -> None:
    permutation = KeyedPermutation(length, key)
    assert sorted(permutation[position] for position in range(length)) == list(range(length))


@given(length=st.integers(1, 10**12), data=st.data())
def test_values_of_long_permutations_are_in_range_and_differ(length: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, length - 1), unique=True, max_size=50))
    values = [KeyedPermutation(length, (1,))[position] for position in positions]
    assert len(set(values)) == len(positions)
    assert all(0 <= value < length for value in values)


def test_other_keys_give_other_permutations() -> None:
    def values(*key: int) -> tuple[int, ...]:
        return tuple(KeyedPermutation(50, key))

    assert values(1, 2) == values(1, 2)
    assert len({values(*key) for key in ((1, 2), (2, 1), (12,), (1, 3), (0, 0))}) == 5


@pytest.mark.parametrize("length", [2, 3, 4])
def test_all_orders_of_a_few_values_are_about_as_frequent(length: int) -> None:
    counts = Counter(tuple(KeyedPermutation(length, (key,))) for key in range(2400))
    orders = {2: 2, 3: 6, 4: 24}[length]
    assert len(counts) == orders
    assert max(counts.values()) < 1.5 * 2400 / orders
    assert min(counts.values()) > 0.6 * 2400 / orders


@pytest.mark.parametrize("length", [10, 97, 1000])
def test_every_value_is_as_frequent_at_a_position(length: int) -> None:
    """Chi-squared over tenths of the range, of the values at the first and at the last position under many keys."""
    for position in (0, length - 1):
        values = np.array([KeyedPermutation(length, (key, 7))[position] for key in range(4000)])
        observed, _ = np.histogram(values, bins=10, range=(0, length))
        expected, _ = np.histogram(np.arange(length), bins=10, range=(0, length))
        expected = expected * 4000 / length
        # 99.99 % of the chi-squared distribution with nine degrees of freedom lie below.
        assert ((observed - expected) ** 2 / expected).sum() < 33.7


def test_consecutive_positions_lie_anywhere() -> None:
    values = np.array([KeyedPermutation(10_000, (3,))[position] for position in range(2000)])
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.1
    assert abs(np.corrcoef(values, np.arange(2000))[0, 1]) < 0.1


def test_a_value_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        permutation = KeyedPermutation(10**8, (0, 0))
        values = {permutation[position] for position in (0, 1, 10**7, 10**8 - 1)}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(values) == 4
    assert peak < 100_000


def test_positions_outside_are_refused() -> None:
    for position in (-1, 5):
        with pytest.raises(IndexError, match=f"position {position} of a permutation of 5"):
            KeyedPermutation(5, (0,))[position]

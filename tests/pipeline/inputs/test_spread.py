import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inputs.spread import spread_counts, spread_place

TOTALS = st.lists(st.integers(0, 40), max_size=8)


@pytest.mark.parametrize(
    ("chosen", "total", "places"), [(1, 5, [2]), (2, 4, [1, 3]), (3, 10, [1, 5, 8]), (4, 4, [0, 1, 2, 3])]
)
def test_places_are_the_middles_of_equal_shares(chosen: int, total: int, places: list[int]) -> None:
    assert [spread_place(number, chosen, total) for number in range(chosen)] == places


@given(TOTALS, st.integers(1, 400))
def test_counts_are_those_of_the_places_in_each_group(totals: list[int], chosen: int) -> None:
    total = sum(totals)
    kept = min(chosen, total)
    places = [spread_place(number, kept, total) for number in range(kept)]
    counts, start = [], 0
    for group in totals:
        counts.append(sum(start <= place < start + group for place in places))
        start += group
    assert spread_counts(totals, chosen) == counts
    assert sum(counts) == kept

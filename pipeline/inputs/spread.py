"""Some of many, spread evenly: by whole numbers, so that the choice is the same everywhere."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

__all__ = ["spread_counts", "spread_place"]


def spread_place(number: int, chosen: int, total: int) -> int:
    """The place among ``total`` of the one of this ``number`` among ``chosen`` of them: the middle of its share."""
    return (2 * number + 1) * total // (2 * chosen)


def spread_counts(totals: Sequence[int], chosen: int) -> list[int]:
    """How many of ``chosen`` fall into each of several groups of ``totals``, spread over them all in their order.

    All are chosen where they are no more than ``chosen``.
    """
    total = sum(totals)
    if chosen >= total:
        return list(totals)
    # Those before a bound: numbers n with (2 n + 1) total < 2 chosen bound.
    before = [-((total - 2 * chosen * bound) // (2 * total)) for bound in accumulate(totals, initial=0)]
    return [stop - start for start, stop in pairwise(before)]

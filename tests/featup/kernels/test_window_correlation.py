"""Windowed correlation against its formula in float64."""

from itertools import product

import pytest
import torch

from featup.errors import GeometryError
from featup.kernels import Backend
from featup.kernels.window_correlation import window_correlation
from tests.featup.kernels.support import (
    BACKENDS,
    OTHER_WINDOWS,
    SIZES,
    SQUARE_WINDOWS,
    inside_nan,
    named,
    size_ids,
    source_for,
    stride_ids,
    window_ids,
)
from tests.featup.support import TOLERANCE, random, relative_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [1, 3, 4, 32, 67], ids=named("depth"))
@pytest.mark.parametrize("window", SQUARE_WINDOWS + OTHER_WINDOWS, ids=window_ids)
def test_window_correlation_windows(window: tuple[int, int], depth: int, backend: Backend) -> None:
    check_window_correlation((5, 3), window, (1, 1), depth, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 4)], ids=stride_ids)
@pytest.mark.parametrize("window", [(7, 7), (1, 4)], ids=window_ids)
@pytest.mark.parametrize("size", SIZES, ids=size_ids)
def test_window_correlation_sizes_and_strides(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], backend: Backend
) -> None:
    check_window_correlation(size, window, stride, 32, backend)


def check_window_correlation(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], depth: int, backend: Backend
) -> None:
    query, key = random(2, *size, depth), source_for(size, window, stride, depth)
    expected = window_correlation(query.double(), key.double(), stride, "naive")
    found = window_correlation(inside_nan(query), inside_nan(key), stride, backend)
    assert relative_error(found, expected) <= TOLERANCE, "output"


def test_window_correlation_is_the_formula() -> None:
    query, key = random(2, 3, 4, 2).double(), random(2, 7, 4, 2, seed=1).double()
    expected = torch.zeros(2, 3, 4, 3, 1, dtype=torch.float64)
    for b, y, x, i, d in product(range(2), range(3), range(4), range(3), range(2)):
        expected[b, y, x, i, 0] += query[b, y, x, d] * key[b, 2 * y + i, x, d]
    assert relative_error(window_correlation(query, key, (2, 1), "naive"), expected) <= TOLERANCE, "output"


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((1, 4, 5, 2), (1, 3, 5, 2)),
        ((1, 4, 5, 2), (1, 4, 4, 2)),
        ((1, 4, 5, 2), (1, 6, 7, 3)),
        ((2, 4, 5, 2), (1, 6, 7, 2)),
        ((4, 5, 2), (1, 6, 7, 2)),
        ((1, 4, 5, 2), (6, 7, 2)),
    ],
    ids=["height", "width", "depth", "batch", "query-without-batch", "keys-without-batch"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_window_correlation_refuses_shapes(query: tuple[int, ...], key: tuple[int, ...], backend: Backend) -> None:
    with pytest.raises(GeometryError, match=r"window_correlation: .*(needs keys of|need a query) \["):
        window_correlation(random(*query), random(*key), backend=backend)


@pytest.mark.parametrize("key", [(1, 6, 9, 2), (1, 7, 8, 2)], ids=["height", "width"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_window_correlation_refuses_keys_short_of_the_stride(key: tuple[int, ...], backend: Backend) -> None:
    with pytest.raises(GeometryError, match=r"with stride \(2, 2\) needs keys of \[1, >=7, >=9, 2\], got \("):
        window_correlation(random(1, 4, 5, 2), random(*key), (2, 2), backend)

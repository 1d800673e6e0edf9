"""Transposed adaptive convolution against its formula in float64."""

from itertools import product

import pytest
import torch

from featup.errors import GeometryError
from featup.kernels import Backend
from featup.kernels.adaptive_conv_transpose import adaptive_conv_transpose
from tests.featup.kernels.support import BACKENDS, SIZES, inside_nan, read_by, size_ids, stride_ids, window_ids
from tests.featup.support import TOLERANCE, random, relative_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 4)], ids=stride_ids)
@pytest.mark.parametrize("window", [(7, 7), (3, 2), (1, 15)], ids=window_ids)
@pytest.mark.parametrize("size", SIZES, ids=size_ids)
def test_adaptive_conv_transpose(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], backend: Backend
) -> None:
    values, filters = random(2, *size, 5), random(2, *size, *window, seed=1)
    expected = adaptive_conv_transpose(values.double(), filters.double(), stride, "naive")
    found = adaptive_conv_transpose(inside_nan(values), inside_nan(filters), stride, backend)
    assert relative_error(found, expected) <= TOLERANCE, "output"
    assert not found.movedim(-1, 0)[..., ~read_by(size, window, stride)].any(), "outside every window"


def test_adaptive_conv_transpose_is_the_formula() -> None:
    values, filters = random(2, 3, 4, 2).double(), random(2, 3, 4, 4, 2, seed=1).double()
    expected = torch.zeros(2, 8, 8, 2, dtype=torch.float64)
    for b, y, x, i, j, c in product(range(2), range(3), range(4), range(4), range(2), range(2)):
        expected[b, 2 * y + i, 2 * x + j, c] += filters[b, y, x, i, j] * values[b, y, x, c]
    assert relative_error(adaptive_conv_transpose(values, filters, (2, 2), "naive"), expected) <= TOLERANCE, "output"


@pytest.mark.parametrize(
    ("values", "filters"),
    [
        ((1, 4, 5, 2), (1, 3, 5, 3, 3)),
        ((1, 4, 5, 2), (1, 4, 6, 3, 3)),
        ((2, 4, 5, 2), (1, 4, 5, 3, 3)),
        ((4, 5, 2), (1, 4, 5, 3, 3)),
        ((1, 4, 5, 2), (4, 5, 3, 3)),
    ],
    ids=["height", "width", "batch", "no-batch", "filters-without-batch"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_conv_transpose_refuses_shapes(
    values: tuple[int, ...], filters: tuple[int, ...], backend: Backend
) -> None:
    with pytest.raises(GeometryError, match=r"adaptive_conv_transpose: need values \[.* of one batch and size, got \("):
        adaptive_conv_transpose(random(*values), random(*filters), backend=backend)

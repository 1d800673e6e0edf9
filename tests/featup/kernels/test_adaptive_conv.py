"""Adaptive convolution against its formula in float64."""

from itertools import product

import pytest
import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.kernels import Backend
from featup.kernels.adaptive_conv import adaptive_conv
from tests.featup.kernels.support import (
    BACKENDS,
    CHANNELS,
    OTHER_WINDOWS,
    SIZES,
    SQUARE_WINDOWS,
    channel_ids,
    inside_nan,
    read_by,
    size_ids,
    source_for,
    stride_ids,
    window_ids,
)
from tests.featup.support import TOLERANCE, random, relative_error


def check_adaptive_conv(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], channels: int, backend: Backend
) -> None:
    source = source_for(size, window, stride, channels)
    filters = random(2, *size, *window, seed=1)
    expected = adaptive_conv(source.double(), filters.double(), stride, "naive")
    unread = ~read_by(size, window, stride)
    poisoned = source.masked_fill(unread[None, :, :, None], torch.nan)
    found = adaptive_conv(inside_nan(poisoned), inside_nan(filters), stride, backend)
    assert relative_error(found, expected) <= TOLERANCE, "output"
    out = torch.full_like(found, torch.nan)
    assert adaptive_conv(poisoned, filters, stride, backend, out) is out
    assert relative_error(out, expected) <= TOLERANCE, "out="


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS, ids=channel_ids)
@pytest.mark.parametrize("window", SQUARE_WINDOWS + OTHER_WINDOWS, ids=window_ids)
def test_adaptive_conv_windows(window: tuple[int, int], channels: int, backend: Backend) -> None:
    check_adaptive_conv((5, 3), window, (1, 1), channels, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 4)], ids=stride_ids)
@pytest.mark.parametrize("window", [(1, 1), (7, 7), (3, 2)], ids=window_ids)
@pytest.mark.parametrize("size", SIZES, ids=size_ids)
def test_adaptive_conv_sizes_and_strides(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], backend: Backend
) -> None:
    check_adaptive_conv(size, window, stride, 5, backend)


def test_adaptive_conv_is_the_formula() -> None:
    """One loop per index, so that naive itself is held to something."""
    source, filters = random(2, 8, 8, 2).double(), random(2, 3, 4, 4, 2, seed=1).double()
    expected = torch.zeros(2, 3, 4, 2, dtype=torch.float64)
    for b, y, x, i, j, c in product(range(2), range(3), range(4), range(4), range(2), range(2)):
        expected[b, y, x, c] += filters[b, y, x, i, j] * source[b, 2 * y + i, 2 * x + j, c]
    found = adaptive_conv(source, filters, (2, 2), "naive")
    assert relative_error(found, expected) <= TOLERANCE, "output"


@pytest.mark.parametrize(
    ("source", "filters"),
    [
        ((1, 4, 5, 2), (1, 2, 4, 3, 3)),
        ((1, 5, 5, 2), (1, 2, 3, 3, 3)),
        ((2, 4, 5, 2), (1, 2, 3, 3, 3)),
        ((4, 5, 2), (1, 2, 3, 3, 3)),
        ((1, 4, 5), (1, 2, 3, 3, 3)),
        ((1, 4, 5, 2), (2, 3, 3, 3)),
    ],
    ids=["width", "height", "batch", "no-batch", "no-channels", "filters-without-batch"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_conv_refuses_shapes(source: tuple[int, ...], filters: tuple[int, ...], backend: Backend) -> None:
    with pytest.raises(GeometryError, match=r"adaptive_conv: .*need a source (of )?\["):
        adaptive_conv(random(*source), random(*filters), backend=backend)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(1, 2, 3, 3),
        torch.zeros(1, 1, 3, 2),
        torch.zeros(1, 2, 3, 2, dtype=torch.float16),
        torch.zeros(1, 2, 2, 3).transpose(2, 3),
    ],
    ids=["channels", "height", "dtype", "strides"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_conv_refuses_out(out: Tensor, backend: Backend) -> None:
    """Bug: the cpu backend wrote past the end of an ``out`` that was too small."""
    with pytest.raises(GeometryError, match=r"out must be contiguous \[1, 2, 3, 2\] torch.float32, got"):
        adaptive_conv(random(1, 4, 5, 2), random(1, 2, 3, 3, 3), backend=backend, out=out)

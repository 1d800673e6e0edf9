"""Resampling by any taps, its gradients and its transposed taps."""

from itertools import product

import pytest
import torch

from featup.errors import GeometryError
from featup.kernels import Backend
from featup.kernels.resample import Interpolation, Taps, interpolation_taps, resample
from tests.featup.kernels.support import (
    BACKENDS,
    CHANNELS,
    KINDS,
    TABLES,
    channel_ids,
    differentiable_backends,
    gradients,
    inside_nan,
    named,
)
from tests.featup.support import TOLERANCE, random, relative_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", CHANNELS, ids=channel_ids)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [(5, 3), (10, 6), (11, 7), (3, 2)], ids=named("to"))
def test_resample(to: tuple[int, int], kind: Interpolation, channels: int, backend: Backend) -> None:
    source = random(2, 5, 3, channels)
    rows, cols = (interpolation_taps(kind, n, m, reflect=2) for n, m in zip((5, 3), to, strict=True))
    expected = resample(source.double(), rows, cols, "naive")
    found = resample(inside_nan(source), rows, cols, backend)
    assert relative_error(found, expected) <= TOLERANCE, "output"


@pytest.mark.parametrize("backend", BACKENDS)
def test_resample_by_any_taps(backend: Backend) -> None:
    """Tap counts that no interpolation has, and another one on each axis."""
    source = random(2, 6, 4, 3)
    rows = Taps(torch.tensor([[5, 0, 2], [1, 1, 1]]), random(2, 3), 6)
    cols = Taps(torch.arange(15).remainder(4).view(3, 5), random(3, 5), 4)
    expected = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    for y, s, x, t in product(range(2), range(3), range(3), range(5)):
        weight = rows.weight[y, s] * cols.weight[x, t]
        expected[:, y, x] += (weight * source[:, rows.index[y, s], cols.index[x, t]]).double()
    assert relative_error(resample(inside_nan(source), rows, cols, backend), expected) <= TOLERANCE, "output"


@differentiable_backends
@pytest.mark.parametrize("channels", [1, 37], ids=channel_ids)
@pytest.mark.parametrize("batch", [1, 3], ids=named("batch"))
@pytest.mark.parametrize("table", TABLES)
def test_gradient_of_resample(table: str, batch: int, channels: int, backend: Backend) -> None:
    rows, cols = TABLES[table]
    source = inside_nan(random(batch, 6, 5, channels))
    expected = gradients(lambda s: resample(s, rows, cols, "naive"), source.double())
    found = gradients(lambda s: resample(s, rows, cols, backend), source)
    for what, ours, naive in zip(("output", "gradient"), found, expected, strict=True):
        assert ours.dtype == torch.float32, what
        assert relative_error(ours, naive) <= TOLERANCE, what


@differentiable_backends
@pytest.mark.parametrize("table", TABLES)
def test_gradcheck_of_resample(table: str, backend: Backend) -> None:
    rows, cols = TABLES[table]
    leaf = inside_nan(random(2, 6, 5, 2)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: resample(s, rows, cols, backend), leaf)


@pytest.mark.parametrize("table", TABLES)
def test_transposed_taps(table: str) -> None:
    """The same matrix on its side; padding is index 0 with weight 0, and the table is made once."""
    for taps in TABLES[table]:
        there = taps.transposed()
        assert (len(there), there.size) == (taps.size, len(taps))
        assert taps.transposed() is there, "kept"
        matrices = []
        for one in (taps, there):
            matrix = torch.zeros(len(one), one.size)
            matrices.append(matrix.scatter_add(1, one.index, one.weight))
        assert relative_error(matrices[1], matrices[0].T) <= TOLERANCE, "matrix"
        unread = torch.ones(taps.size, dtype=torch.bool)
        unread[taps.index.flatten()] = False
        assert not there.weight[unread].any(), "weights of unread positions"
        assert not there.index[unread].any(), "indices of unread positions"


@pytest.mark.parametrize("shape", [(1, 3, 5, 2), (1, 4, 6, 2), (4, 5, 2)], ids=["height", "width", "no-batch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resample_refuses_taps_of_another_size(shape: tuple[int, ...], backend: Backend) -> None:
    """Bug: the cpu backend read outside a map smaller than the one the taps were made for."""
    rows, cols = interpolation_taps("bilinear", 4, 8), interpolation_taps("bilinear", 5, 8)
    with pytest.raises(GeometryError, match=r"resample: these taps read a source of \[B, 4, 5, C\], got \("):
        resample(random(*shape), rows, cols, backend)

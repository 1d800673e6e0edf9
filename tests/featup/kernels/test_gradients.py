"""Every gradient against the formula in float64, and against finite differences."""

from collections.abc import Iterator
from typing import Any

import numba
import pytest
import torch
from torch import Tensor

from featup.kernels import Backend
from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import interpolation_taps, resample
from featup.kernels.window_correlation import window_correlation
from tests.featup.kernels.support import (
    BACKENDS,
    BILINEAR,
    TABLES,
    arguments,
    bilinear,
    channel_ids,
    differentiable_backends,
    gradients,
    named,
    source_for,
    stride_ids,
    window_ids,
)
from tests.featup.support import TOLERANCE, random, relative_error


@differentiable_backends
@pytest.mark.parametrize("channels", [1, 37], ids=channel_ids)
@pytest.mark.parametrize("batch", [1, 3], ids=named("batch"))
@pytest.mark.parametrize(
    ("stride", "window"),
    [((1, 1), (7, 7)), ((1, 1), (2, 9)), ((2, 3), (7, 5)), ((2, 3), (1, 2)), ((16, 8), (17, 9)), ((16, 8), (3, 7))],
    ids=str,
)
@bilinear
def test_every_gradient(
    name: str, stride: tuple[int, int], window: tuple[int, int], batch: int, channels: int, backend: Backend
) -> None:
    inputs = arguments(name, batch, (2, 3) if stride == (16, 8) else (4, 9), window, stride, channels)
    expected = gradients(lambda *leaves: BILINEAR[name](*leaves, stride, "naive"), *(one.double() for one in inputs))
    found = gradients(lambda *leaves: BILINEAR[name](*leaves, stride, backend), *inputs)
    for what, ours, naive in zip(("output", "gradient 0", "gradient 1"), found, expected, strict=True):
        assert ours.dtype == torch.float32, what
        assert relative_error(ours, naive) <= TOLERANCE, what


@differentiable_backends
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=stride_ids)
@pytest.mark.parametrize("window", [(3, 3), (1, 2)], ids=window_ids)
@bilinear
def test_gradcheck(name: str, window: tuple[int, int], stride: tuple[int, int], backend: Backend) -> None:
    inputs = [one.double().requires_grad_() for one in arguments(name, 2, (2, 3), window, stride, 2)]
    assert torch.autograd.gradcheck(lambda *leaves: BILINEAR[name](*leaves, stride, backend), inputs)


@bilinear
def test_only_the_gradients_asked_for(name: str) -> None:
    """Each argument alone, with the other one constant and no longer kept."""
    inputs = arguments(name, 2, (4, 5), (3, 2), (1, 2), 6)
    both = gradients(lambda *leaves: BILINEAR[name](*leaves, (1, 2), "cpu"), *inputs)
    for asked in (0, 1):
        leaves = [one.detach().requires_grad_(index == asked) for index, one in enumerate(inputs)]
        out = BILINEAR[name](leaves[0], leaves[1], (1, 2), "cpu")
        torch.autograd.backward(out, random(*out.shape, seed=9))
        found = leaves[asked].grad
        assert found is not None
        assert torch.equal(found, both[1 + asked]), f"gradient {asked}"
        assert leaves[1 - asked].grad is None
        assert out.grad_fn is not None
        node: Any = BILINEAR[name](leaves[0], leaves[1], (1, 2), "cpu").grad_fn
        assert node.saved_tensors[asked] is None, "the factor that no gradient needs is not kept"


def test_gradients_of_a_stage() -> None:
    """Correlation, softmax and convolution in one graph, as joint bilateral upsampling trains them."""
    found: dict[str, list[Tensor]] = {}
    backends: list[Backend] = ["naive", "torch", "cpu"]
    for backend in backends:
        source = source_for((6, 5), (7, 7), (1, 1), 67).requires_grad_()
        keys = random(2, 12, 11, 32, seed=2).requires_grad_()
        filters = window_correlation(keys[:, 3:-3, 3:-3], keys, backend=backend)
        filters = filters.flatten(-2).softmax(-1).view(2, 6, 5, 7, 7)
        torch.autograd.backward(adaptive_conv(source, filters, backend=backend).square().sum())
        assert source.grad is not None
        assert keys.grad is not None
        found[backend] = [source.grad, keys.grad]
    for backend in ("torch", "cpu"):
        for name, ours, naive in zip(("source", "keys"), found[backend], found["naive"], strict=True):
            assert relative_error(ours, naive) <= TOLERANCE, f"{backend}: gradient of {name}"


@pytest.fixture
def numba_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.mark.usefixtures("numba_threads")
@pytest.mark.parametrize("name", [*BILINEAR, "resample"])
def test_gradients_are_the_same_bits_every_time(name: str) -> None:
    """From run to run, and whatever the number of threads."""
    if name == "resample":
        rows, cols = interpolation_taps("bicubic", 23, 46, 3), interpolation_taps("bicubic", 31, 62, 3)
        inputs: tuple[Tensor, ...] = (random(2, 23, 31, 37),)
    else:
        inputs = arguments(name, 2, (23, 31), (7, 7), (1, 1), 37)

    def function(*leaves: Tensor) -> Tensor:
        if name == "resample":
            return resample(*leaves, rows, cols, "cpu")
        return BILINEAR[name](*leaves, (1, 1), "cpu")

    first = gradients(function, *inputs)
    for threads in (numba.config.NUMBA_NUM_THREADS, numba.config.NUMBA_NUM_THREADS, 1):
        numba.set_num_threads(threads)
        for before, again in zip(first, gradients(function, *inputs), strict=True):
            assert torch.equal(before, again), f"{threads} threads"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*BILINEAR, "resample"])
def test_empty_batch(name: str, backend: Backend) -> None:
    if name == "resample":
        rows, cols = TABLES["bicubic-up"]
        found = gradients(lambda s: resample(s, rows, cols, backend), torch.empty(0, 6, 5, 3))
        shapes = [(0, 19, 16, 3), (0, 6, 5, 3)]
    else:
        inputs = [torch.empty(0, *one.shape[1:]) for one in arguments(name, 1, (4, 5), (3, 2), (1, 2), 6)]
        found = gradients(lambda *leaves: BILINEAR[name](*leaves, (1, 2), backend), *inputs)
        full = BILINEAR[name](*arguments(name, 1, (4, 5), (3, 2), (1, 2), 6), (1, 2), "naive")
        shapes = [(0, *full.shape[1:]), *(tuple(one.shape) for one in inputs)]
    assert [tuple(one.shape) for one in found] == shapes

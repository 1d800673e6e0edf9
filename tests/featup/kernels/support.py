"""Sizes, inputs inside NaN and gradients that the tests of all operators share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from featup.kernels import Backend
from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.adaptive_conv_transpose import adaptive_conv_transpose
from featup.kernels.resample import Interpolation, Taps, interpolation_taps, resample
from featup.kernels.window_correlation import window_correlation
from tests.featup.support import random

BACKENDS: list[Backend] = ["naive", "torch", "cpu"]
KINDS: list[Interpolation] = ["nearest", "bilinear", "bicubic"]
SIZES = [(1, 1), (1, 9), (5, 3), (7, 11), (17, 4)]
SQUARE_WINDOWS = [(1, 1), (3, 3), (5, 5), (7, 7), (9, 9)]
OTHER_WINDOWS = [(3, 7), (9, 1), (1, 8), (2, 15)]
CHANNELS = [1, 3, 64, 67]


def named(*names: str) -> Callable[[Any], str]:
    """Readable ids: pairs as 3x7, the rest with the given name in front."""
    return lambda value: f"{names[0]}{'x'.join(map(str, value)) if isinstance(value, tuple) else value}"


size_ids, window_ids, stride_ids, channel_ids = (named(n) for n in ("map", "window", "stride", "channels"))


def inside_nan(tensor: Tensor) -> Tensor:
    """The same values as a non-contiguous view whose surroundings, on every axis, are NaN."""
    host = torch.full([side + 3 for side in tensor.shape], torch.nan, dtype=tensor.dtype)
    view = host[tuple(slice(1, 1 + side) for side in tensor.shape)]
    return view.copy_(tensor)


def source_for(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], channels: int) -> Tensor:
    height, width = ((n - 1) * s + k for n, s, k in zip(size, stride, window, strict=True))
    return random(2, height, width, channels)


def read_by(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Which source positions the windows cover: ``[Hs, Ws]``."""
    axes = []
    for n, k, s in zip(size, window, stride, strict=True):
        axis = torch.zeros((n - 1) * s + k, dtype=torch.bool)
        for start in range(0, n * s, s):
            axis[start : start + k] = True
        axes.append(axis)
    return axes[0][:, None] & axes[1]


Bilinear = Callable[[Tensor, Tensor, tuple[int, int], Backend], Tensor]
BILINEAR: dict[str, Bilinear] = {
    "adaptive_conv": adaptive_conv,
    "adaptive_conv_transpose": adaptive_conv_transpose,
    "window_correlation": window_correlation,
}
bilinear = pytest.mark.parametrize("name", BILINEAR)
differentiable_backends = pytest.mark.parametrize("backend", ["torch", "cpu"])


def arguments(
    name: str, batch: int, size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], channels: int
) -> tuple[Tensor, Tensor]:
    """Both arguments of a bilinear operator, as views inside NaN."""
    over = torch.cat([source_for(size, window, stride, channels)] * 2)[:batch]
    vectors, filters = random(batch, *size, channels, seed=1), random(batch, *size, *window, seed=2)
    first, second = {
        "adaptive_conv": (over, filters),
        "adaptive_conv_transpose": (vectors, filters),
        "window_correlation": (vectors, over),
    }[name]
    return inside_nan(first), inside_nan(second)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output and the gradient of each input, for a gradient of the output that is the same every time."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    out = function(*leaves)
    # Channels first in memory: a gradient need not be contiguous.
    towards = random(*out.shape, seed=9).to(out).movedim(-1, 0).contiguous().movedim(0, -1)
    return [out.detach(), *torch.autograd.grad(out, leaves, towards)]


VIEW_ROWS = Taps(torch.tensor([[5, 0, 2], [1, 1, 1], [5, 5, 0], [2, 0, 1]]), random(4, 3), 6)
TABLES: dict[str, tuple[Taps, Taps]] = {
    **{
        f"{kind}-{name}": (interpolation_taps(kind, 6, height, reflect), interpolation_taps(kind, 5, width, reflect))
        for kind in KINDS
        for name, height, width, reflect in (("up", 13, 10, 3), ("down", 2, 3, 0))
    },
    # What a view of an image reads: flipped, out of order, repeated, and some positions not at all.
    "flipped": (interpolation_taps("bilinear", 6, 9)[2:7], Taps(torch.arange(4, -1, -1)[:, None], torch.ones(5, 1), 5)),
    "unordered": (VIEW_ROWS, Taps(torch.tensor([[4, 4, 1, 0, 0]] * 3), random(3, 5), 5)),
    "one": (Taps(torch.tensor([[3]]), torch.tensor([[0.5]]), 6), Taps(torch.tensor([[0, 4]]), random(1, 2), 5)),
}
Operator = Callable[[Tensor, Backend], Tensor]
OPERATORS: dict[str, Operator] = {
    "adaptive_conv": lambda t, backend: adaptive_conv(t, torch.ones(1, 2, 3, 3, 3, dtype=t.dtype), backend=backend),
    "adaptive_conv_transpose": lambda t, backend: adaptive_conv_transpose(
        t, torch.ones(1, 4, 5, 3, 3, dtype=t.dtype), backend=backend
    ),
    "window_correlation": lambda t, backend: window_correlation(t[:, 1:-1, 1:-1], t, backend=backend),
    "resample": lambda t, backend: resample(
        t, interpolation_taps("bicubic", 4, 7), interpolation_taps("bicubic", 5, 9), backend
    ),
}
operators = pytest.mark.parametrize("name", OPERATORS)

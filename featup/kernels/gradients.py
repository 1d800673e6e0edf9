"""Gradients of the numba loops over windows.

All three operators are derivatives of one form, linear in each of its arguments,

``sum_{b, y, x, i, j, c} source[b, y * sy + i, x * sx + j, c] * filters[b, y, x, i, j] * out[b, y, x, c]``

``adaptive_conv`` by ``out``, ``window_correlation`` by ``filters`` and ``adaptive_conv_transpose`` by ``source``. So
the gradients of each are the other two. Every loop gathers the terms of one position of its result. No two threads add
to one position, so the gradients are the same bits in every run.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from featup.kernels.adaptive_conv.cpu import adaptive_conv
from featup.kernels.adaptive_conv_transpose.cpu import adaptive_conv_transpose
from featup.kernels.window_correlation.cpu import window_correlation

__all__ = ["AdaptiveConv", "AdaptiveConvTranspose", "WindowCorrelation"]


class _Bilinear(Function):
    """Base of the three operators: each factor is saved only if the gradient of the other is needed."""

    @staticmethod
    def save(ctx: Any, first: Tensor, second: Tensor, stride: tuple[int, int]) -> None:
        """Save the operator's two arguments for its backward pass."""
        ctx.save_for_backward(first if ctx.needs_input_grad[1] else None, second if ctx.needs_input_grad[0] else None)
        ctx.stride = stride


class AdaptiveConv(_Bilinear):
    """``apply(source, filters, stride)``, see :mod:`featup.kernels.adaptive_conv`."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, filters: Tensor, stride: tuple[int, int]) -> Tensor:
        """``[B, Hs, Ws, C]`` and ``[B, H, W, K, L]`` to ``[B, H, W, C]``."""
        _Bilinear.save(ctx, source, filters, stride)
        return adaptive_conv(source, filters, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of source and filters."""
        source, filters = ctx.saved_tensors
        return (
            None if filters is None else adaptive_conv_transpose(grad, filters, ctx.stride),
            None if source is None else window_correlation(grad, source, ctx.stride),
            None,
        )


class AdaptiveConvTranspose(_Bilinear):
    """``apply(values, filters, stride)``, see :mod:`featup.kernels.adaptive_conv_transpose`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, filters: Tensor, stride: tuple[int, int]) -> Tensor:
        """``[B, H, W, C]`` and ``[B, H, W, K, L]`` to ``[B, Hs, Ws, C]``."""
        _Bilinear.save(ctx, values, filters, stride)
        return adaptive_conv_transpose(values, filters, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of values and filters."""
        values, filters = ctx.saved_tensors
        return (
            None if filters is None else adaptive_conv(grad, filters, ctx.stride),
            None if values is None else window_correlation(values, grad, ctx.stride),
            None,
        )


class WindowCorrelation(_Bilinear):
    """``apply(query, key, stride)``, see :mod:`featup.kernels.window_correlation`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, stride: tuple[int, int]) -> Tensor:
        """``[B, H, W, D]`` and ``[B, Hs, Ws, D]`` to ``[B, H, W, K, L]``."""
        _Bilinear.save(ctx, query, key, stride)
        return window_correlation(query, key, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of query and key."""
        query, key = ctx.saved_tensors
        return (
            None if key is None else adaptive_conv(key, grad, ctx.stride),
            None if query is None else adaptive_conv_transpose(query, grad, ctx.stride),
            None,
        )

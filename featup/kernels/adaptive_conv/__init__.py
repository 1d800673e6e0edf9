"""Adaptive convolution: every output position has its own filter, shared by all channels.

``out[b, y, x, c] = sum_{i, j} filters[b, y, x, i, j] * source[b, y * sy + i, x * sx + j, c]``

The core of joint bilateral upsampling (FeatUp, section 3.2).
"""

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.kernels import Backend, choose_backend, wants_gradient
from featup.kernels.adaptive_conv import naive

__all__ = ["adaptive_conv"]


def adaptive_conv(
    source: Tensor,
    filters: Tensor,
    stride: tuple[int, int] = (1, 1),
    backend: Backend = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Apply its own filter at each output position.

    Args:
        source: ``[B, Hs, Ws, C]``, already padded: ``Hs = (H - 1) * stride[0] + K`` and likewise for the width.
        filters: ``[B, H, W, K, L]``: taps by row and column of the window, not flipped.
        stride: (height, width) step of the window in source positions.
        out: A contiguous tensor ``[B, H, W, C]`` of the source's type that receives the result, without a gradient.

    Returns:
        ``[B, H, W, C]``.

    Raises:
        GeometryError: shapes that do not fit each other, or ``out`` is of another shape or type than the result.
        BackendError: the chosen backend cannot run on these tensors.
    """
    if source.dim() != 4 or filters.dim() != 5:
        raise GeometryError(
            f"adaptive_conv: need a source [B, Hs, Ws, C] and filters [B, H, W, K, L], got {tuple(source.shape)} and "
            f"{tuple(filters.shape)}; both are channels-last with the batch in front"
        )
    batch, height, width, kernel_h, kernel_w = filters.shape
    needed = (batch, (height - 1) * stride[0] + kernel_h, (width - 1) * stride[1] + kernel_w)
    if tuple(source.shape[:3]) != needed:
        raise GeometryError(
            f"adaptive_conv: filters {tuple(filters.shape)} with stride {stride} need a source of "
            f"[{needed[0]}, {needed[1]}, {needed[2]}, C], got {tuple(source.shape)}; pad the source by the window"
        )
    shape = (batch, height, width, source.shape[3])
    if out is not None and (tuple(out.shape) != shape or out.dtype != source.dtype or not out.is_contiguous()):
        raise GeometryError(
            f"adaptive_conv: out must be contiguous {list(shape)} {source.dtype}, got {list(out.shape)} {out.dtype} "
            f"with strides {out.stride()}; give such a tensor, or none"
        )
    match choose_backend(backend, "adaptive_conv", source, filters):
        case "naive":
            result = naive.adaptive_conv(source, filters, stride)
        case "cpu":
            if out is None and wants_gradient(source, filters):
                from featup.kernels.gradients import AdaptiveConv

                result = AdaptiveConv.apply(source, filters, stride)  # type: ignore[no-untyped-call]
            else:
                from featup.kernels.adaptive_conv import cpu

                return cpu.adaptive_conv(source, filters, stride, out)
        case _:
            result = _shifted(source, filters, stride)
    return result if out is None else out.copy_(result.detach())


def _shifted(source: Tensor, filters: Tensor, stride: tuple[int, int]) -> Tensor:
    """One multiply-add over the whole map per tap: no unfolded copy of the source, differentiable."""
    _, height, width, kernel_h, kernel_w = filters.shape
    out: Tensor | None = None
    for i in range(kernel_h):
        for j in range(kernel_w):
            window = source[
                :,
                i : i + (height - 1) * stride[0] + 1 : stride[0],
                j : j + (width - 1) * stride[1] + 1 : stride[1],
            ]
            weight = filters[:, :, :, i, j, None]
            if out is None:
                out = window * weight
            elif torch.is_grad_enabled():
                out = torch.addcmul(out, window, weight)
            else:
                out.addcmul_(window, weight)
    assert out is not None
    return out

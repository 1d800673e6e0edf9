"""Transposed adaptive convolution: every position spreads its vector over a window, by its own filter.

``out[b, y * sy + i, x * sx + j, c] += filters[b, y, x, i, j] * values[b, y, x, c]``, over all ``y, x, i, j``

It maps the gradient of an adaptive convolution's output to the gradient of its source.
"""

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.kernels import Backend, choose_backend, wants_gradient
from featup.kernels.adaptive_conv_transpose import naive

__all__ = ["adaptive_conv_transpose"]


def adaptive_conv_transpose(
    values: Tensor, filters: Tensor, stride: tuple[int, int] = (1, 1), backend: Backend = "auto"
) -> Tensor:
    """Spread each vector over a window by its own filter, and add up where windows overlap.

    Args:
        values: ``[B, H, W, C]``.
        filters: ``[B, H, W, K, L]``: taps by row and column of the window, not flipped.
        stride: (height, width) step of the window in positions of the result.

    Returns:
        ``[B, (H - 1) * stride[0] + K, (W - 1) * stride[1] + L, C]``; zero at positions outside all windows.

    Raises:
        GeometryError: shapes that do not fit each other.
        BackendError: the chosen backend cannot run on these tensors.
    """
    if values.dim() != 4 or filters.dim() != 5 or values.shape[:3] != filters.shape[:3]:
        raise GeometryError(
            f"adaptive_conv_transpose: need values [B, H, W, C] and filters [B, H, W, K, L] of one batch and size, got "
            f"{tuple(values.shape)} and {tuple(filters.shape)}; both are channels-last, with a filter for each position"
        )
    match choose_backend(backend, "adaptive_conv_transpose", values, filters):
        case "naive":
            return naive.adaptive_conv_transpose(values, filters, stride)
        case "cpu":
            if wants_gradient(values, filters):
                from featup.kernels.gradients import AdaptiveConvTranspose

                result: Tensor = AdaptiveConvTranspose.apply(values, filters, stride)  # type: ignore[no-untyped-call]
                return result
            from featup.kernels.adaptive_conv_transpose import cpu

            return cpu.adaptive_conv_transpose(values, filters, stride)
        case _:
            return _shifted(values, filters, stride)


def _shifted(values: Tensor, filters: Tensor, stride: tuple[int, int]) -> Tensor:
    """One multiply-add over the whole map per tap: no folded copy of the windows, differentiable."""
    batch, height, width, kernel_h, kernel_w = filters.shape
    reach = ((height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1)
    dtype = torch.promote_types(values.dtype, filters.dtype)
    out = values.new_zeros(batch, reach[0] - 1 + kernel_h, reach[1] - 1 + kernel_w, values.shape[3], dtype=dtype)
    for i in range(kernel_h):
        for j in range(kernel_w):
            window = out[:, i : i + reach[0] : stride[0], j : j + reach[1] : stride[1]]
            window.addcmul_(values, filters[:, :, :, i, j, None])
    return out

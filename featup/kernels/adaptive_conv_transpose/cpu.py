"""Numba loops in gather form: every position collects from all windows that cover it, so threads never collide."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from featup.kernels.caching import numba

Array = NDArray[Any]


def adaptive_conv_transpose(values: Tensor, filters: Tensor, stride: tuple[int, int]) -> Tensor:
    """``[B, H, W, C]`` and ``[B, H, W, K, L]`` to ``[B, (H - 1) * sy + K, (W - 1) * sx + L, C]``."""
    batch, height, width, kernel_h, kernel_w = filters.shape
    size = ((height - 1) * stride[0] + kernel_h, (width - 1) * stride[1] + kernel_w)
    out = torch.empty(batch, *size, values.shape[3], dtype=values.dtype)
    _adaptive_conv_transpose(
        values.detach().contiguous().numpy(),
        filters.detach().contiguous().numpy(),
        out.numpy(),
        stride[0],
        stride[1],
    )
    return out


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _adaptive_conv_transpose(values: Array, filters: Array, out: Array, stride_y: int, stride_x: int) -> None:
    """``out [B, Hs, Ws, C]`` from ``values [B, H, W, C]`` and ``filters [B, H, W, K, L]``."""
    _, height, width, kernel_h, kernel_w = filters.shape
    batch, out_height, out_width, channels = out.shape
    for line in numba.prange(batch * out_height):
        b = line // out_height
        row = line % out_height
        # The windows that cover this row start at most kernel_h - 1 above it. A gap between windows has none.
        first_y = max(0, (row - kernel_h) // stride_y + 1)
        stop_y = min(height, row // stride_y + 1)
        for col in range(out_width):
            first_x = max(0, (col - kernel_w) // stride_x + 1)
            stop_x = min(width, col // stride_x + 1)
            total = out[b, row, col]
            for c in range(channels):
                total[c] = 0.0
            for y in range(first_y, stop_y):
                taps = filters[b, y, :, row - y * stride_y]
                windows = values[b, y]
                x = first_x
                j = col - x * stride_x
                # Several windows per pass over the channels: the running sum is loaded and stored less often.
                while x + 7 <= stop_x:
                    w0, w1 = taps[x, j], taps[x + 1, j - stride_x]
                    w2, w3 = taps[x + 2, j - 2 * stride_x], taps[x + 3, j - 3 * stride_x]
                    w4, w5 = taps[x + 4, j - 4 * stride_x], taps[x + 5, j - 5 * stride_x]
                    w6 = taps[x + 6, j - 6 * stride_x]
                    v0, v1, v2, v3 = windows[x], windows[x + 1], windows[x + 2], windows[x + 3]
                    v4, v5, v6 = windows[x + 4], windows[x + 5], windows[x + 6]
                    for c in range(channels):
                        total[c] += (
                            w0 * v0[c] + w1 * v1[c] + w2 * v2[c] + w3 * v3[c] + w4 * v4[c] + w5 * v5[c] + w6 * v6[c]
                        )
                    x += 7
                    j -= 7 * stride_x
                while x < stop_x:
                    weight = taps[x, j]
                    value = windows[x]
                    for c in range(channels):
                        total[c] += weight * value[c]
                    x += 1
                    j -= stride_x

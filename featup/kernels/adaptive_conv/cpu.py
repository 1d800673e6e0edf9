"""Numba loops over channels-last data: the channel loop is innermost, contiguous and vectorised."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from featup.kernels.caching import numba

Array = NDArray[Any]


def adaptive_conv(source: Tensor, filters: Tensor, stride: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """``[B, Hs, Ws, C]`` and ``[B, H, W, K, L]`` to ``[B, H, W, C]``, into a contiguous ``out`` if given."""
    if out is None:
        out = torch.empty(*filters.shape[:3], source.shape[3], dtype=source.dtype)
    _adaptive_conv(
        source.detach().contiguous().numpy(),
        filters.detach().contiguous().numpy(),
        out.numpy(),
        stride[0],
        stride[1],
    )
    return out


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _adaptive_conv(source: Array, filters: Array, out: Array, stride_y: int, stride_x: int) -> None:
    batch, height, width, kernel_h, kernel_w = filters.shape
    channels = source.shape[3]
    for line in numba.prange(batch * height):
        b = line // height
        y = line % height
        for x in range(width):
            total = out[b, y, x]
            for c in range(channels):
                total[c] = 0.0
            for i in range(kernel_h):
                row = source[b, y * stride_y + i]
                weights = filters[b, y, x, i]
                left = x * stride_x
                j = 0
                # Several taps per pass over the channels: the running sum is loaded and stored less often.
                while j + 7 <= kernel_w:
                    w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
                    w4, w5, w6 = weights[j + 4], weights[j + 5], weights[j + 6]
                    s0, s1, s2, s3 = row[left + j], row[left + j + 1], row[left + j + 2], row[left + j + 3]
                    s4, s5, s6 = row[left + j + 4], row[left + j + 5], row[left + j + 6]
                    for c in range(channels):
                        total[c] += (
                            w0 * s0[c] + w1 * s1[c] + w2 * s2[c] + w3 * s3[c] + w4 * s4[c] + w5 * s5[c] + w6 * s6[c]
                        )
                    j += 7
                while j < kernel_w:
                    weight = weights[j]
                    tap = row[left + j]
                    for c in range(channels):
                        total[c] += weight * tap[c]
                    j += 1

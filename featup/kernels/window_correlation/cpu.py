"""Numba loops: one short dot product per tap, vectorised over the key's depth."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from featup.kernels.caching import numba

Array = NDArray[Any]


def window_correlation(query: Tensor, key: Tensor, stride: tuple[int, int]) -> Tensor:
    """``[B, H, W, D]`` and ``[B, (H - 1) * sy + K, (W - 1) * sx + L, D]`` to ``[B, H, W, K, L]``."""
    batch, height, width, _ = query.shape
    kernel = (key.shape[1] - (height - 1) * stride[0], key.shape[2] - (width - 1) * stride[1])
    out = torch.empty(batch, height, width, *kernel, dtype=query.dtype)
    _window_correlation(
        query.detach().contiguous().numpy(), key.detach().contiguous().numpy(), out.numpy(), stride[0], stride[1]
    )
    return out


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _window_correlation(query: Array, key: Array, out: Array, stride_y: int, stride_x: int) -> None:
    """``out [B, H, W, K, L]`` from ``query [B, H, W, D]`` and ``key [B, Hs, Ws, D]``."""
    batch, height, width, kernel_h, kernel_w = out.shape
    depth = query.shape[3]
    for line in numba.prange(batch * height):
        b = line // height
        y = line % height
        for x in range(width):
            centre = query[b, y, x]
            for i in range(kernel_h):
                row = key[b, y * stride_y + i]
                for j in range(kernel_w):
                    other = row[x * stride_x + j]
                    total = query.dtype.type(0)
                    for d in range(depth):
                        total += centre[d] * other[d]
                    out[b, y, x, i, j] = total

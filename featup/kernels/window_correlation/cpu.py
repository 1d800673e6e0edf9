"""Numba loops: one short dot product per tap, vectorised over the key's depth."""

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def window_correlation(query: Array, key: Array, out: Array) -> None:
    """``out [B, H, W, K, L]`` from ``query [B, H, W, D]`` and ``key [B, H + K - 1, W + L - 1, D]``."""
    batch, height, width, kernel_h, kernel_w = out.shape
    depth = query.shape[3]
    for line in numba.prange(batch * height):
        b = line // height
        y = line % height
        for x in range(width):
            own = query[b, y, x]
            for i in range(kernel_h):
                for j in range(kernel_w):
                    other = key[b, y + i, x + j]
                    total = np.float32(0.0)
                    for d in range(depth):
                        total += own[d] * other[d]
                    out[b, y, x, i, j] = total

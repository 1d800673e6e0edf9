"""Numba loops: each output row first blends its source rows, then walks along the blended row."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from featup.kernels.caching import numba
from featup.kernels.resample.taps import Taps

Floats = NDArray[Any]
Ints = NDArray[np.int64]


class Resample(Function):
    """``apply(source, rows, cols)``: the gradient is resampled by the transposed taps."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, rows: Taps, cols: Taps) -> Tensor:
        """``[B, h, w, C]`` to ``[B, len(rows), len(cols), C]``."""
        ctx.taps = rows, cols
        return resample(source, rows, cols)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the source."""
        rows, cols = ctx.taps
        return resample(grad, rows.transposed(), cols.transposed()), None, None


def resample(source: Tensor, rows: Taps, cols: Taps) -> Tensor:
    """``[B, h, w, C]`` to ``[B, len(rows), len(cols), C]``."""
    rows, cols = rows.to(source), cols.to(source)
    out = torch.empty(source.shape[0], len(rows), len(cols), source.shape[3], dtype=source.dtype)
    _resample(
        source.detach().contiguous().numpy(),
        rows.index.numpy(),
        rows.weight.detach().numpy(),
        cols.index.numpy(),
        cols.weight.detach().numpy(),
        out.numpy(),
    )
    return out


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _resample(
    source: Floats, row_index: Ints, row_weight: Floats, col_index: Ints, col_weight: Floats, out: Floats
) -> None:
    """``out [B, H, W, C]`` from ``source [B, h, w, C]`` by taps ``[H, S]`` and ``[W, T]``."""
    batch, height, width, channels = out.shape
    source_width = source.shape[2]
    row_taps = row_index.shape[1]
    col_taps = col_index.shape[1]
    for line in numba.prange(batch * height):
        b = line // height
        y = line % height
        blended = np.empty((source_width, channels), dtype=source.dtype)
        for s in range(row_taps):
            row = source[b, row_index[y, s]]
            weight = row_weight[y, s]
            for i in range(source_width):
                for c in range(channels):
                    if s == 0:
                        blended[i, c] = weight * row[i, c]
                    else:
                        blended[i, c] += weight * row[i, c]
        for x in range(width):
            target = out[b, y, x]
            if col_taps == 4:
                w0, w1, w2, w3 = col_weight[x, 0], col_weight[x, 1], col_weight[x, 2], col_weight[x, 3]
                s0, s1 = blended[col_index[x, 0]], blended[col_index[x, 1]]
                s2, s3 = blended[col_index[x, 2]], blended[col_index[x, 3]]
                for c in range(channels):
                    target[c] = w0 * s0[c] + w1 * s1[c] + w2 * s2[c] + w3 * s3[c]
            else:
                for t in range(col_taps):
                    weight = col_weight[x, t]
                    tap = blended[col_index[x, t]]
                    for c in range(channels):
                        if t == 0:
                            target[c] = weight * tap[c]
                        else:
                            target[c] += weight * tap[c]

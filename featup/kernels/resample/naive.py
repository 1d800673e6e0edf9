"""The formula, with each axis as a dense matrix: the oracle of the tests."""

import torch
from torch import Tensor, einsum

from featup.kernels.resample.taps import Taps


def resample(source: Tensor, rows: Taps, cols: Taps) -> Tensor:
    """``[B, h, w, C]`` to ``[B, len(rows), len(cols), C]``."""
    return einsum("yi,xj,bijc->byxc", _matrix(rows, source.shape[1]), _matrix(cols, source.shape[2]), source)


def _matrix(taps: Taps, size: int) -> Tensor:
    matrix = torch.zeros(len(taps), size, dtype=taps.weight.dtype, device=taps.weight.device)
    return matrix.scatter_add(1, taps.index, taps.weight)

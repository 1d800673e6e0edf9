"""Separable resampling by taps: interpolation, border handling and row tiles in one operator.

``out[b, y, x, c] = sum_{s, t} rows.weight[y, s] * cols.weight[x, t]``
``                             * source[b, rows.index[y, s], cols.index[x, t], c]``

A border mode is a remapping of indices, and a row tile of the output is a slice of the row taps. A joint upsampler
therefore computes a padded, interpolated tile straight from the coarse map, and nothing larger.
"""

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.kernels import Backend, choose_backend, wants_gradient
from featup.kernels.resample import naive
from featup.kernels.resample.taps import BICUBIC_A, Interpolation, Taps, interpolation_taps

__all__ = ["BICUBIC_A", "Interpolation", "Taps", "interpolation_taps", "resample"]


def resample(source: Tensor, rows: Taps, cols: Taps, backend: Backend = "auto") -> Tensor:
    """Resample both axes of a channels-last map.

    Args:
        source: ``[B, h, w, C]``.
        rows, cols: Taps along the height and along the width, into ``h`` and ``w``.

    Returns:
        ``[B, len(rows), len(cols), C]``.

    Raises:
        GeometryError: taps for a map of another size.
        BackendError: the chosen backend cannot run on this tensor.
    """
    if source.dim() != 4 or tuple(source.shape[1:3]) != (rows.size, cols.size):
        raise GeometryError(
            f"resample: these taps read a source of [B, {rows.size}, {cols.size}, C], got {tuple(source.shape)}; "
            "create the taps for the size of the source"
        )
    match choose_backend(backend, "resample", source):
        case "naive":
            return naive.resample(source, rows.to(source), cols.to(source))
        case "cpu":
            from featup.kernels.resample import cpu

            if wants_gradient(source):
                result: Tensor = cpu.Resample.apply(source, rows, cols)  # type: ignore[no-untyped-call]
                return result
            return cpu.resample(source, rows, cols)
        case _:
            return _along(_along(source, rows.to(source), 1), cols.to(source), 2)


def _along(source: Tensor, taps: Taps, axis: int) -> Tensor:
    shape = [1, 1, 1, 1]
    shape[axis] = len(taps)
    parts = (
        source.index_select(axis, taps.index[:, t]) * taps.weight[:, t].view(shape) for t in range(taps.index.shape[1])
    )
    return sum(parts, torch.zeros((), dtype=source.dtype, device=source.device))

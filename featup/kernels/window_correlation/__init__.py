"""Windowed correlation: each query against the keys of the window around it.

``out[b, y, x, i, j] = sum_d query[b, y, x, d] * key[b, y * sy + i, x * sx + j, d]``

Its softmax over the window is the range kernel of joint bilateral upsampling (FeatUp, section 3.2, eq. 6).
"""

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.kernels import Backend, choose_backend, wants_gradient
from featup.kernels.window_correlation import naive

__all__ = ["window_correlation"]


def window_correlation(
    query: Tensor, key: Tensor, stride: tuple[int, int] = (1, 1), backend: Backend = "auto"
) -> Tensor:
    """Correlate each query with a window of keys.

    Args:
        query: ``[B, H, W, D]``.
        key: ``[B, Hk, Wk, D]``, already padded.
        stride: (height, width) step of the window in keys.

    Returns:
        ``[B, H, W, K, L]``. The windows reach to the last key, which gives their size:
        ``K = Hk - (H - 1) * stride[0]``, ``L = Wk - (W - 1) * stride[1]``.

    Raises:
        GeometryError: shapes that do not fit each other.
        BackendError: the chosen backend cannot run on these tensors.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise GeometryError(
            f"window_correlation: need a query [B, H, W, D] and keys [B, Hk, Wk, D], got {tuple(query.shape)} and "
            f"{tuple(key.shape)}; both are channels-last with the batch in front"
        )
    batch, height, width, depth = query.shape
    reach = ((height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1)
    kernel_h, kernel_w = key.shape[1] - reach[0] + 1, key.shape[2] - reach[1] + 1
    if key.shape[0] != batch or key.shape[3] != depth or kernel_h < 1 or kernel_w < 1:
        raise GeometryError(
            f"window_correlation: query {tuple(query.shape)} with stride {stride} needs keys of "
            f"[{batch}, >={reach[0]}, >={reach[1]}, {depth}], got {tuple(key.shape)}; pad the keys by the window"
        )
    match choose_backend(backend, "window_correlation", query, key):
        case "naive":
            return naive.window_correlation(query, key, stride)
        case "cpu":
            if wants_gradient(query, key):
                from featup.kernels.gradients import WindowCorrelation

                result: Tensor = WindowCorrelation.apply(query, key, stride)  # type: ignore[no-untyped-call]
                return result
            from featup.kernels.window_correlation import cpu

            return cpu.window_correlation(query, key, stride)
        case _:
            taps = [
                (query * key[:, i : i + reach[0] : stride[0], j : j + reach[1] : stride[1]]).sum(-1)
                for i in range(kernel_h)
                for j in range(kernel_w)
            ]
            return torch.stack(taps, -1).view(batch, height, width, kernel_h, kernel_w)

"""Windowed correlation: each query against the keys of the window around it.

``out[b, y, x, i, j] = sum_d query[b, y, x, d] * key[b, y + i, x + j, d]``

Its softmax over the window is the range kernel of joint bilateral upsampling (FeatUp, section 3.2, eq. 6).
"""

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.kernels import Backend, choose_backend
from featup.kernels.window_correlation import naive

__all__ = ["window_correlation"]


def window_correlation(query: Tensor, key: Tensor, backend: Backend = "auto") -> Tensor:
    """Correlate each query with a window of keys.

    Args:
        query: ``[B, H, W, D]``.
        key: ``[B, H + K - 1, W + L - 1, D]``, already padded; the window's size follows from the two shapes.

    Returns:
        ``[B, H, W, K, L]``.

    Raises:
        GeometryError: the two shapes do not belong together.
        BackendError: the backend asked for cannot run on these tensors.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise GeometryError(
            f"window_correlation: need a query [B, H, W, D] and keys [B, H + K - 1, W + L - 1, D], got "
            f"{tuple(query.shape)} and {tuple(key.shape)}; both are channels-last with the batch in front"
        )
    batch, height, width, depth = query.shape
    kernel_h, kernel_w = key.shape[1] - height + 1, key.shape[2] - width + 1
    if key.shape[0] != batch or key.shape[3] != depth or kernel_h < 1 or kernel_w < 1:
        raise GeometryError(
            f"window_correlation: query {tuple(query.shape)} needs keys of [{batch}, >={height}, >={width}, {depth}], "
            f"got {tuple(key.shape)}; pad the keys by the window's radius"
        )
    match choose_backend(backend, "window_correlation", query, key):
        case "naive":
            return naive.window_correlation(query, key)
        case "cpu":
            from featup.kernels.window_correlation import cpu

            out = torch.empty(batch, height, width, kernel_h, kernel_w)
            cpu.window_correlation(query.detach().contiguous().numpy(), key.detach().numpy(), out.numpy())
            return out
        case _:
            taps = [
                (query * key[:, i : i + height, j : j + width]).sum(-1)
                for i in range(kernel_h)
                for j in range(kernel_w)
            ]
            return torch.stack(taps, -1).view(batch, height, width, kernel_h, kernel_w)

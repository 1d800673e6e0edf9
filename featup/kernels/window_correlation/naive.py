"""The formula, by unfolding: the oracle of the tests."""

from torch import Tensor, einsum


def window_correlation(query: Tensor, key: Tensor, stride: tuple[int, int]) -> Tensor:
    """``[B, H, W, D]`` and ``[B, (H - 1) * sy + K, (W - 1) * sx + L, D]`` to ``[B, H, W, K, L]``."""
    kernel_h = key.shape[1] - (query.shape[1] - 1) * stride[0]
    kernel_w = key.shape[2] - (query.shape[2] - 1) * stride[1]
    windows = key.unfold(1, kernel_h, stride[0]).unfold(2, kernel_w, stride[1])
    return einsum("bhwd,bhwdij->bhwij", query, windows)

"""The formula, by unfolding: the oracle of the tests."""

from torch import Tensor, einsum


def window_correlation(query: Tensor, key: Tensor) -> Tensor:
    """``[B, H, W, D]`` and ``[B, H + K - 1, W + L - 1, D]`` to ``[B, H, W, K, L]``."""
    kernel_h, kernel_w = key.shape[1] - query.shape[1] + 1, key.shape[2] - query.shape[2] + 1
    windows = key.unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)
    return einsum("bhwd,bhwdij->bhwij", query, windows)

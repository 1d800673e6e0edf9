"""The formula, by folding: the oracle of the tests, whose memory is too large for other uses."""

from torch import Tensor, einsum
from torch.nn.functional import fold


def adaptive_conv_transpose(values: Tensor, filters: Tensor, stride: tuple[int, int]) -> Tensor:
    """``[B, H, W, C]`` and ``[B, H, W, K, L]`` to ``[B, (H - 1) * sy + K, (W - 1) * sx + L, C]``."""
    _, height, width, kernel_h, kernel_w = filters.shape
    size = ((height - 1) * stride[0] + kernel_h, (width - 1) * stride[1] + kernel_w)
    spread = einsum("bhwc,bhwij->bcijhw", values, filters)
    return fold(spread.flatten(4).flatten(1, 3), size, (kernel_h, kernel_w), stride=stride).movedim(1, -1)

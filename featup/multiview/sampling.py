"""What a step of an implicit fit samples: tokens of views, and positions in their patches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from featup.multiview.views import View, from_view

if TYPE_CHECKING:
    from featup.multiview.implicit import FitOptions

__all__ = []


class PatchPositions:
    """Positions in the patches of many views, to pixels of the image."""

    def __init__(self, views: Sequence[View], size: tuple[int, int], max_pad: int) -> None:
        self.zoom = torch.tensor([view.zoom for view in views], dtype=torch.float64)
        self.top = torch.tensor([view.top for view in views])
        self.left = torch.tensor([view.left for view in views])
        self.flip = torch.tensor([view.flip for view in views])
        self.size, self.pad = size, max_pad

    def __call__(self, view: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        cols = torch.where(self.flip[view], self.size[1] - 1 - cols, cols)
        return self._axis(rows, view, self.top, 0), self._axis(cols, view, self.left, 1)

    def _axis(self, at: Tensor, view: Tensor, begin: Tensor, axis: int) -> Tensor:
        return from_view(at, self.size[axis], self.zoom[view], begin[view], self.pad).round().long()


def sample_tokens(
    options: "FitOptions", views: int, grid: tuple[int, int], stride: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens and positions of one step, of the first ``views``.

    Returns:
        View, row, column and tap, ``[T, P]`` each, and the tokens' numbers among those of all views ``[T]``.
    """
    cells = grid[0] * grid[1]
    token = torch.randint(views * cells, (options.tokens,), generator=generator)
    tap = torch.randint(stride[0] * stride[1], (options.tokens, options.positions), generator=generator)
    cell = (token % cells)[:, None]
    rows = cell // grid[1] * stride[0] + tap // stride[1]
    cols = cell % grid[1] * stride[1] + tap % stride[1]
    return (token // cells)[:, None].expand_as(tap), rows, cols, tap, token


def image_generator(seed: int, image: Tensor) -> torch.Generator:
    """Numbers for one image, by its pixels: its place in a batch or a data set makes no difference."""
    pixels = image.cpu().numpy()
    key = np.frombuffer(pixels.tobytes()[: pixels.size // 8 * 8], np.uint64)
    (state,) = np.random.SeedSequence([seed, int(np.bitwise_xor.reduce(key))]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def scale_colours(image: Tensor) -> Tensor:
    """``[B, H, W, 3]`` scaled per image and channel to [-0.5, 0.5]."""
    least, most = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return (image - least) / (most - least).clamp_min(1e-4) - 0.5


def centre_coordinates(count: int, device: torch.device) -> Tensor:
    """Centres of ``count`` positions along an axis scaled to [-0.5, 0.5]."""
    return (torch.arange(count, device=device) + 0.5) / count - 0.5

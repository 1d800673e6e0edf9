"""Samples of a step of an implicit fit: tokens of views, and positions in the windows that they attend to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from featup.multiview.views import View, from_view

__all__ = ["TokenSample", "ViewPositions", "sample_tokens"]


class TokenSample(NamedTuple):
    """``T`` tokens, and ``P`` positions in the window of each.

    ``view``, ``row``, ``column`` ``[T, P]``: the positions, in pixels of their views. ``tap`` ``[T, P]``: their index
    within the window. ``token`` ``[T]``: the tokens' indices among those of all views.
    """

    view: Tensor
    row: Tensor
    column: Tensor
    tap: Tensor
    token: Tensor


class ViewPositions:
    """Maps positions in many views of an image to pixels of the image."""

    def __init__(self, views: Sequence[View], size: tuple[int, int], max_pad: int) -> None:
        """
        Args:
            views: Of one image.
            size: (height, width) of the image, in pixels.
            max_pad: Of the jitter that the views were sampled from.
        """
        self.zoom = torch.tensor([view.zoom for view in views], dtype=torch.float64)
        self.top = torch.tensor([view.top for view in views])
        self.left = torch.tensor([view.left for view in views])
        self.flip = torch.tensor([view.flip for view in views])
        self.size, self.max_pad = size, max_pad

    def __call__(self, sample: TokenSample) -> tuple[Tensor, Tensor]:
        """Rows and columns of the nearest pixels of the image, int64 ``[T, P]`` each."""
        view = sample.view
        column = torch.where(self.flip[view], self.size[1] - 1 - sample.column, sample.column)
        return self._axis(sample.row, view, self.top, 0), self._axis(column, view, self.left, 1)

    def _axis(self, positions: Tensor, view: Tensor, offset: Tensor, axis: int) -> Tensor:
        return from_view(positions, self.size[axis], self.zoom[view], offset[view], self.max_pad).round().long()


def sample_tokens(
    tokens: int,
    positions: int,
    views: int,
    grid: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    generator: torch.Generator,
) -> TokenSample:
    """Sample tokens of the views, and positions in their windows, uniformly and with replacement.

    Args:
        tokens, positions: How many tokens, and how many positions for each.
        views: Number of views.
        grid: (height, width) of a view in tokens.
        kernel, stride: (height, width) of the windows and from one to the next, in pixels of a view.
        generator: The only source of chance.
    """
    cells = grid[0] * grid[1]
    token = torch.randint(views * cells, (tokens,), generator=generator)
    tap = torch.randint(kernel[0] * kernel[1], (tokens, positions), generator=generator)
    cell = (token % cells)[:, None]
    return TokenSample(
        view=(token // cells)[:, None].expand_as(tap),
        row=cell // grid[1] * stride[0] + tap // kernel[1],
        column=cell % grid[1] * stride[1] + tap % kernel[1],
        tap=tap,
        token=token,
    )

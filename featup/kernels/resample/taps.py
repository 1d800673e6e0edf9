"""Taps: the source positions and weights of each output position along an axis, and those of interpolation."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from featup.errors import GeometryError

__all__ = ["BICUBIC_A", "Interpolation", "Taps", "interpolation_taps"]

Interpolation = Literal["nearest", "bilinear", "bicubic"]

BICUBIC_A = -0.75  # Keys' a of torch.nn.functional.interpolate, with which the FeatUp weights were trained


@dataclass(frozen=True, eq=False)
class Taps:
    """The source positions that each output position along one axis reads, and their weights.

    Positions may repeat, in any order, and may be left out. No gradient reaches the weights.

    Attributes:
        index: int64 ``[N, T]``.
        weight: float32 ``[N, T]``.
        size: Length of the axis that the taps read.
    """

    index: Tensor
    weight: Tensor
    size: int

    def __getitem__(self, part: slice) -> "Taps":
        return Taps(self.index[part], self.weight[part], self.size)

    def __len__(self) -> int:
        return self.index.shape[0]

    def to(self, like: Tensor) -> "Taps":
        """The same taps on the device and in the floating type of ``like``."""
        return Taps(self.index.to(like.device), self.weight.to(like.device, like.dtype), self.size)

    def transposed(self) -> "Taps":
        """The transposed operator: each source position reads the output positions that read it.

        Computed once. ``[size, T']``, where ``T'`` is the largest number of readers of a position; rows of positions
        with fewer readers end in taps of weight zero at position 0. Resampling by these taps maps the gradient of the
        output to the gradient of the source.
        """
        return self._transposed

    @cached_property
    def _transposed(self) -> "Taps":
        count = len(self)
        pairs, pair_of_tap = torch.unique(self.index * count + torch.arange(count)[:, None], return_inverse=True)
        # Two taps of an output position that read one source position, as at a clamped border, are added up.
        total = self.weight.new_zeros(len(pairs)).index_add_(0, pair_of_tap.flatten(), self.weight.detach().flatten())
        source, reader = pairs // count, pairs % count
        readers = source.bincount(minlength=self.size)
        slot = torch.arange(len(pairs)) - (readers.cumsum(0) - readers)[source]
        shape = (self.size, max(1, int(readers.max())))
        index, weight = self.index.new_zeros(shape), self.weight.new_zeros(shape)
        index[source, slot] = reader
        weight[source, slot] = total
        return Taps(index, weight, count)


@lru_cache(maxsize=256)
# Cached taps outlive the caller's mode: a tensor created under inference_mode could not be used in training later.
@torch.inference_mode(False)
def interpolation_taps(
    kind: Interpolation, size: int, out_size: int, reflect: int = 0, bicubic_a: float = BICUBIC_A
) -> Taps:
    """Taps that equal ``torch.nn.functional.interpolate(mode=kind, align_corners=False)`` along one axis.

    Args:
        size, out_size: Length of the axis before and after.
        reflect: Number of positions added at both ends, equal to reflection padding of the *interpolated* axis (its
            border not repeated). A short axis is reflected several times; an axis of one position repeats it.
        bicubic_a: Keys' ``a`` of the cubic kernel (Keys, 1981). A lower value gives neighbours more negative weights
            and a sharper result.

    Raises:
        GeometryError: a size below one.
    """
    if size < 1 or out_size < 1:
        raise GeometryError(f"interpolation from {size} to {out_size} positions: both must be at least 1")
    period = max(1, 2 * (out_size - 1))
    at = torch.arange(-reflect, out_size + reflect).remainder(period)
    at = torch.where(at < out_size, at, period - at)
    if kind == "nearest":
        index = (at * size).div(out_size, rounding_mode="floor")[:, None]
        return Taps(index, torch.ones_like(index, dtype=torch.float32), size)
    centre = (at.double() + 0.5) * (size / out_size) - 0.5
    first = centre.floor()
    t = (centre - first)[:, None]
    if kind == "bilinear":
        offsets, weight = torch.arange(0, 2), torch.cat([1 - t, t], 1)
    else:
        offsets = torch.arange(-1, 3)
        distance = (offsets - t).abs()
        a = bicubic_a
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weight = torch.where(distance <= 1, near, far)
    index = (first[:, None].long() + offsets).clamp(0, size - 1)
    return Taps(index, weight.float(), size)

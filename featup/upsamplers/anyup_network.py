"""The encoders of AnyUp: residual blocks of 1x1 convolutions, rotary positions, and any features to a fixed width.

The parameters are named as in the published state dict.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Bands", "Encoder", "FeatureUnification", "ResidualBlock", "Rotation"]

GROUPS = 8
# Bytes of a band. The C library returns larger blocks to the system as soon as they are released.
_BAND_BYTES = 32 << 20
# Positions that a band is computed in at once: their channels stay in a CPU's cache.
_POSITIONS = {"cpu": 1 << 12, "cuda": 1 << 18}
# Responses to the patterns of the unification that are held at once, at most.
_RESPONSES = 1 << 21


class Bands:
    """A map ``[1, H, W, D]`` in bands of rows, each a tensor of its own that can be released before the others."""

    def __init__(self, bands: Sequence[Tensor]) -> None:
        self.bands = list(bands)
        lengths = [band.shape[1] for band in bands]
        self.starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]

    @classmethod
    def empty(cls, like: Tensor, width: int) -> "Bands":
        """Uninitialised bands of ``width`` channels for an image ``[1, H, W, 3]``, of its type and on its device."""
        _, height, across, _ = like.shape
        count = max(1, min(height, height * across * width * like.element_size() // _BAND_BYTES))
        edges = [height * number // count for number in range(count + 1)]
        return cls([like.new_empty(1, b - a, across, width) for a, b in pairwise(edges)])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``: ``[1, stop - start, W, D]``, a view where they lie in one band."""
        parts = []
        for first, band in zip(self.starts, self.bands, strict=False):
            if first < stop and first + band.shape[1] > start:
                parts.append(band[:, max(0, start - first) : stop - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def release(self, row: int) -> None:
        """Release the bands that end at or above ``row``."""
        for number, stop in enumerate(self.starts[1:]):
            if stop <= row:
                self.bands[number] = self.bands[number].new_empty(1, 0, 0, 0)

    def tiles(self) -> Iterator[Tensor]:
        """All positions, ``[P, D]`` at a time: views."""
        for band in self.bands:
            yield from torch.split(band.view(-1, band.shape[-1]), _POSITIONS.get(band.device.type, 1 << 18))


class ResidualBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))`` with 1x1 convolutions; NCHW."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D, H, W]`` to the same shape."""
        updated: Tensor = x + self.block(x)
        return updated

    def update(self, stream: Bands, hidden: Bands, moments: "_Moments", scratch: Tensor) -> "_Moments":
        """:meth:`forward` in place and in tiles, without a gradient.

        Args:
            stream: The map, overwritten.
            hidden: Receives the map between the two convolutions.
            moments: The statistics of the stream.
            scratch: ``[P, D]``, at least a tile.

        Returns:
            The statistics of the updated stream.
        """
        first, _, expand, second, _, contract = self.block
        assert isinstance(first, nn.GroupNorm)
        assert isinstance(second, nn.GroupNorm)
        expanding, contracting = _matrix(expand), _matrix(contract)
        scale, shift = moments.affine(first)
        between, after = _Moments(scratch), _Moments(scratch)
        for source, target in zip(stream.tiles(), hidden.tiles(), strict=True):
            activated = torch.addcmul(shift, source, scale, out=scratch[: len(source)])
            torch.mm(functional.silu(activated, inplace=True), expanding, out=target)
            between.add(target)
        scale, shift = between.affine(second)
        for source, target in zip(hidden.tiles(), stream.tiles(), strict=True):
            activated = torch.addcmul(shift, source, scale, out=scratch[: len(source)])
            target.addmm_(functional.silu(activated, inplace=True), contracting)
            after.add(target)
        return after


class Encoder(nn.Sequential):
    """A first layer and two residual blocks."""

    def __init__(self, first: nn.Module, width: int) -> None:
        super().__init__(first, ResidualBlock(width), ResidualBlock(width))

    def fill(self, source: Iterator[Tensor], target: Bands) -> None:
        """Encode in tiles, without a gradient, where the first layer is a 1x1 convolution.

        The statistics of the group norms go over the whole map. The map is therefore held, twice: the stream of the
        residual blocks, and what lies between their convolutions.

        Args:
            source: Tiles ``[P, C]``, those of ``target`` too.
            target: ``[1, H, W, D]``.
        """
        first, *blocks = self
        weight = _matrix(first)
        # One block of memory for all tiles: the C library would return each tile's to the system, page by page.
        scratch = torch.empty_like(max(target.tiles(), key=len))
        moments = _Moments(scratch)
        for tile, encoded in zip(source, target.tiles(), strict=True):
            encoded.copy_(torch.mm(tile, weight, out=scratch[: len(tile)]))
            moments.add(encoded)
        hidden = Bands([torch.empty_like(band) for band in target.bands])
        for block in blocks:
            assert isinstance(block, ResidualBlock)
            moments = block.update(target, hidden, moments, scratch)


def _matrix(convolution: nn.Module) -> Tensor:
    """The matrix ``[C, D]`` of a 1x1 convolution of channels-last positions."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.flatten(1).T


class _Moments:
    """Mean and variance of each group of channels, from tiles, shifted by the first tile's mean."""

    def __init__(self, scratch: Tensor) -> None:
        self.scratch = scratch
        self.count = 0
        self.shift: Tensor | None = None

    def add(self, tile: Tensor) -> None:
        """Add ``[P, D]``."""
        if self.shift is None:
            self.shift = tile.mean(0)
            self.sums = tile.new_zeros(2, tile.shape[1], dtype=torch.float64)
        deviation = torch.sub(tile, self.shift, out=self.scratch[: len(tile)])
        self.sums[0] += deviation.sum(0)
        self.sums[1] += deviation.square_().sum(0)
        self.count += len(tile)

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """The scale and shift ``[D]`` of each channel that the group norm amounts to."""
        assert self.shift is not None
        deviation = self.sums[0] / self.count
        variance = self.sums[1] / self.count - deviation.square()
        means = (self.shift + deviation).view(norm.num_groups, -1)
        mean = means.mean(1, keepdim=True)
        # Of a group: the mean of its channels' variances, and the variance of their means.
        total = variance.view_as(means).mean(1, keepdim=True) + (means - mean).square().mean(1, keepdim=True)
        scale = (total + norm.eps).rsqrt().expand_as(means).flatten() * norm.weight
        shift = norm.bias - mean.expand_as(means).flatten() * scale
        return scale.to(self.shift), shift.to(self.shift)


class Rotation(nn.Module):
    """Rotary positions: channels in pairs, turned by angles that are linear in the position in the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        quarter = 2 * math.pi * 100 ** -torch.linspace(0, 1, width // 4)
        freqs = torch.zeros(2, width)
        freqs[0, : width // 2] = quarter.repeat(2)
        freqs[1, width // 2 :] = quarter.repeat(2)
        self.freqs = nn.Parameter(freqs)

    def angles(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Angles of the rows ``[H, 1, D]`` and of the columns ``[W, D]``; a pixel's is their sum.

        The first and the last position of an axis are 0 and 1.
        """
        along = (torch.linspace(0, 1, side, dtype=self.freqs.dtype, device=self.freqs.device) for side in size)
        rows, columns = (at[:, None] * freqs for at, freqs in zip(along, self.freqs, strict=True))
        return rows[:, None], columns

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Turn ``[1, n, W, D]`` by the angles ``[n, 1, D]`` of its rows and ``[W, D]`` of its columns."""
        angle = rows + columns
        first, second = x.chunk(2, -1)
        turned: Tensor = x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()
        return turned


class FeatureUnification(nn.Module):
    """Features of any number of channels to ``width``: the patterns in their channels, averaged over these.

    Each of ``C`` channels is correlated with ``width`` patterns of 5x5 positions. A softmax says which responses are
    large, and their mean is taken. The published weights were trained with softmaxes across channels: numbered channel
    by channel, every ``C``-th response shares one.
    """

    def __init__(self, width: int, side: int = 5) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(width, 1, side, side))

    def forward(self, features: Tensor) -> Tensor:
        """``[1, C, h, w]`` to ``[1, width, h, w]``."""
        patterns, side = self.basis.shape[0], self.basis.shape[-1]
        _, channels, height, width = features.shape
        padding = (side // 2,) * 4
        padded = functional.pad(features.transpose(0, 1), padding)
        inside = functional.pad(features.new_ones(1, 1, height, width), padding)
        # In row tiles: all responses together can be larger than a map of the image's size.
        step = max(1, _RESPONSES // (patterns * channels * width))
        tiles = []
        for start in range(0, height, step):
            halo = slice(start, start + step + side - 1)
            responses = functional.conv2d(padded[:, :, halo], self.basis)
            responses = responses / functional.conv2d(inside[:, :, halo], torch.ones_like(self.basis[:1]))
            tiles.append(responses.view(patterns, channels, -1, width).softmax(0).mean(1))
        return torch.cat(tiles, 1)[None]

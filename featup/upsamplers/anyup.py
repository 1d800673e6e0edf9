"""AnyUp: one trained upsampler for the features of any backbone (Wimmer et al., arXiv 2510.12764).

An implementation of our own of the network in https://github.com/wimmerth/anyup, whose code and weights are by Thomas
Wimmer and others, under CC-BY-4.0.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels import wants_gradient
from featup.kernels.resample import Taps, resample
from featup.upsamplers.anyup_network import GROUPS, Bands, Encoder, FeatureUnification, Rotation
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, normalise_colours
from featup.upsamplers.jbu import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["AnyUp"]

HEADS = 4
WINDOW = 0.1
"""A position attends to the coarse cells within this share of the map's height and width, in each direction."""
# Attention weights of all heads that are held at once, at most.
_WEIGHTS = 1 << 20


class AnyUp(Upsampler):
    """Attention of each output position to a window of coarse cells, the same for all channels.

    The queries are an encoding of the image. The keys are another, averaged over each coarse cell, together with an
    encoding of the coarse features that does not depend on their number of channels. The softmaxes of four heads are
    averaged, and weight the coarse features themselves. So the map is linear over space, and every vector is a
    weighted mean of the coarse vectors around it.

    The encoders' group norms take statistics over the whole image, so it holds three maps of ``width`` channels at the
    image's size while it encodes; without gradients that is all. While it upsamples, it holds one, and releases it
    from the top.
    """

    name = "anyup"

    def __init__(self, width: int = 128) -> None:
        """
        Args:
            width: Channels of queries and keys, a multiple of 8; 128 in the published weights.

        Raises:
            GeometryError: a width that heads and groups do not divide.
        """
        super().__init__()
        if width < 1 or width % math.lcm(GROUPS, HEADS):
            raise GeometryError(f"anyup: width={width} must be a positive multiple of {math.lcm(GROUPS, HEADS)}")
        self.width = width
        self.image_encoder = Encoder(nn.Conv2d(3, width, 1, bias=False), width)
        self.key_encoder = Encoder(nn.Conv2d(width, width, 1, bias=False), width)
        self.query_encoder = Encoder(nn.Conv2d(width, width, 1, bias=False), width)
        self.key_features_encoder = Encoder(FeatureUnification(width), width)
        # Its values and its output are not used; the published state dict has them.
        attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        cross = {"norm_q": nn.RMSNorm(width), "norm_k": nn.RMSNorm(width), "attention": attention}
        smooth = nn.Conv2d(width, width, 3, bias=False)
        self.cross_decode = nn.ModuleDict({"cross_attn": nn.ModuleDict(cross), "conv2d": smooth})
        self.aggregation = Encoder(nn.Conv2d(2 * width, width, 3, bias=False), width)
        self.rope = Rotation(width)

    def mapped_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_row_tiles`. The keys come from all channels, the values are mapped."""
        values = features if channel_map is None else functional.linear(features, channel_map.weight)
        for rows, tile in self._attended(features, values, guidance, size):
            yield rows, (tile if channel_map is None else tile + channel_map.bias.to(tile)).to(features.dtype)

    def operator_row_tiles(
        self, features: Tensor, values: Tensor, guidance: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.operator_row_tiles`."""
        for rows, tile in self._attended(features, values, guidance, size):
            yield rows, tile.to(values.dtype)

    def _attended(
        self, features: Tensor, values: Tensor, guidance: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """The attention's results in the floating type of the weights."""
        dtype = self.rope.freqs.dtype
        queries, image_keys = self._encode_image(as_guidance(guidance, dtype), (features.shape[1], features.shape[2]))
        keys = self._keys(features.to(dtype), image_keys)
        yield from self._attend(queries, keys, values[0].to(dtype), size)

    def _encode_image(self, guidance: Tensor, low: tuple[int, int]) -> tuple[Bands, Tensor]:
        """``[1, H, W, 3]`` in [0, 1] to what queries ``[1, H, W, D]`` and keys ``[1, h, w, D]`` are made of."""
        image = normalise_colours(guidance, IMAGENET_MEAN, IMAGENET_STD)
        rows, columns = self.rope.angles((image.shape[1], image.shape[2]))
        if wants_gradient(guidance, *self.parameters()):
            encoded = self.rope(self.image_encoder(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), rows, columns)
            planes = encoded.permute(0, 3, 1, 2)
            queries, keys = (
                Bands([encoder(planes).permute(0, 2, 3, 1)]) for encoder in (self.query_encoder, self.key_encoder)
            )
            return queries, _pool_to(keys, low)
        stream = Bands.empty(image, self.width)
        self.image_encoder.fill(_like_tiles(image, stream), stream)
        for start, band in zip(stream.starts, stream.bands, strict=False):
            for number in range(band.shape[1]):
                row = band[:, number : number + 1]
                row.copy_(self.rope(row, rows[start + number : start + number + 1], columns))
        keys = Bands.empty(image, self.width)
        self.key_encoder.fill(stream.tiles(), keys)
        pooled = _pool_to(keys, low)
        del keys
        # In place: the encoded image is not needed any more.
        self.query_encoder.fill(stream.tiles(), stream)
        return stream, pooled

    def _keys(self, features: Tensor, image_keys: Tensor) -> Tensor:
        """Coarse features ``[1, h, w, C]`` and the image's part ``[1, h, w, D]`` to keys ``[h, w, D]``."""
        planes = functional.normalize(features, dim=-1).permute(0, 3, 1, 2)
        both = torch.cat([image_keys.permute(0, 3, 1, 2), self.key_features_encoder(planes)], 1)
        keys = self.aggregation(_reflect(both)).permute(0, 2, 3, 1)[0]
        return self._project(keys, 1, "norm_k")

    def _queries(self, encoded: Bands, rows: Taps, columns: Taps) -> Tensor:
        """Queries ``[n, W', D]`` of the output positions that ``rows`` and ``columns``, of one more each side, read."""
        smoothed = self.cross_decode["conv2d"](_pool(encoded, rows, columns).permute(0, 3, 1, 2))
        return self._project(smoothed.permute(0, 2, 3, 1)[0], 0, "norm_q") / math.sqrt(self.width // HEADS)

    def _project(self, x: Tensor, part: int, norm: str) -> Tensor:
        """The attention's norm and input projection of queries (``part`` 0) or keys (1), for all heads."""
        parts = self.cross_decode["cross_attn"]
        assert isinstance(parts, nn.ModuleDict)
        attention = parts["attention"]
        assert isinstance(attention, nn.MultiheadAttention)
        weight, bias = (values.chunk(3)[part] for values in (attention.in_proj_weight, attention.in_proj_bias))
        return functional.linear(parts[norm](x), weight, bias)

    def _attend(
        self, encoded: Bands, keys: Tensor, values: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Weighted means of ``values [h, w, C]``, in row tiles ``[1, n, W', C]``.

        A tile is cut into blocks of columns. The positions of a block share the union of their windows: they attend to
        it by one matrix product, and a mask leaves each its own window.
        """
        low = (keys.shape[0], keys.shape[1])
        block = _block(size[1], low[1])
        blocks = math.ceil(size[1] / block)
        cells, within = _window_columns(size[1], low[1], block, keys.device)
        first, stop = (edge.tolist() for edge in _window_edges(size[0], low[0]))
        most = max(b - a for a, b in zip(first, stop, strict=True))
        step = _block(size[0], low[0])
        step = max(1, min(step, _WEIGHTS // (HEADS * blocks * block * cells.shape[1] * (most + 1))))
        down = _pooling_taps(encoded.starts[-1], size[0], size[0])
        across = _pooling_taps(encoded.rows(0, 1).shape[2], size[1], blocks * block)
        for top in range(0, size[0], step):
            bottom = min(top + step, size[0])
            window = slice(first[top], stop[bottom - 1])
            queries = self._queries(encoded, down[top : bottom + 2], across)
            # The next tile reads from the row above its first.
            encoded.release(int(down.index[bottom, 0]))
            queries = queries.view(bottom - top, blocks, block, HEADS, -1).permute(1, 3, 0, 2, 4).flatten(2, 3)
            nearby = keys.view(*low, HEADS, -1)[window][:, cells].permute(1, 3, 4, 0, 2).flatten(3)
            logits = queries @ nearby
            row = torch.arange(window.start, window.stop, device=keys.device)
            bounds = torch.tensor([first[top:bottom], stop[top:bottom]], device=keys.device)[:, :, None]
            visible = ((row >= bounds[0]) & (row < bounds[1]))[:, None, :, None] & within[:, None, :, None, :]
            logits.masked_fill_(~visible.flatten(3).flatten(1, 2)[:, None], -math.inf)
            weights = logits.softmax(-1).mean(1)
            del logits
            tile = weights @ values[window][:, cells].transpose(0, 1).flatten(1, 2)
            tile = tile.view(blocks, -1, block, tile.shape[-1]).transpose(0, 1).flatten(1, 2)
            yield slice(top, bottom), tile[None, :, : size[1]]


def _block(high: int, low: int) -> int:
    """Positions along one side of a block of queries: about a coarse cell's, so that their windows nearly agree."""
    return max(4, min(16, math.ceil(high / low)))


def _window_edges(high: int, low: int) -> Tensor:
    """First and last + 1 coarse cell of the window of each of ``high`` positions along an axis: int64 ``[2, high]``.

    In float32, as the published weights were trained: elsewhere rounding would decide for other cells.
    """
    centres = (torch.arange(high, dtype=torch.float32) + 0.5) / high
    first = ((centres - WINDOW).clamp(0, 1) * low).floor()
    stop = ((centres + WINDOW).clamp(0, 1) * low).ceil()
    return torch.stack([first, stop]).long()


def _window_columns(high: int, low: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For blocks of ``block`` positions: the cells that each attends to, and which of them each position does.

    Returns:
        int64 ``[blocks, K]`` and bool ``[blocks, block, K]``. Positions beyond the last repeat it.
    """
    blocks = math.ceil(high / block)
    position = torch.arange(blocks * block).clamp(max=high - 1).view(blocks, block)
    first, stop = (edge[position] for edge in _window_edges(high, low))
    cells = first[:, :1] + torch.arange(int((stop[:, -1] - first[:, 0]).max()))
    within = (cells[:, None] >= first[..., None]) & (cells[:, None] < stop[..., None])
    return cells.clamp(max=low - 1).to(device), within.to(device)


@lru_cache(maxsize=64)
# Cached taps outlive the caller's mode, like those of interpolation.
@torch.inference_mode(False)
def _pooling_taps(size: int, out_size: int, positions: int) -> Taps:
    """Means over the cells of ``adaptive_avg_pool2d``, between zeros: one before, and after the last ``out_size``.

    There are ``positions + 2`` in all.
    """
    at = torch.arange(-1, positions + 1)
    clamped = at.clamp(0, out_size - 1)
    start = (clamped * size).div(out_size, rounding_mode="floor")
    stop = ((clamped + 1) * size + out_size - 1).div(out_size, rounding_mode="floor")
    index = start[:, None] + torch.arange(int((stop - start).max()))
    weight = (index < stop[:, None]) / (stop - start)[:, None] * (at == clamped)[:, None]
    return Taps(index.clamp(max=size - 1), weight.float(), size)


def _pool(bands: Bands, rows: Taps, columns: Taps) -> Tensor:
    """``[1, len(rows), len(columns), D]`` from the rows of ``bands`` that are read."""
    start, stop = int(rows.index.min()), int(rows.index.max()) + 1
    return resample(bands.rows(start, stop), Taps(rows.index - start, rows.weight, stop - start), columns)


def _pool_to(bands: Bands, size: tuple[int, int]) -> Tensor:
    """Means over the cells of a grid of ``size``: ``[1, h, w, D]``."""
    height, width = bands.starts[-1], bands.rows(0, 1).shape[2]
    down, across = _pooling_taps(height, size[0], size[0])[1:-1], _pooling_taps(width, size[1], size[1])[1:-1]
    return torch.cat([_pool(bands, down[row : row + 1], across) for row in range(size[0])], 1)


def _reflect(planes: Tensor) -> Tensor:
    """One more position on each side of ``[B, C, h, w]``, by reflection; an axis of one position repeats it."""
    for axis in (2, 3):
        last = planes.shape[axis] - 1
        index = [min(1, last), *range(last + 1), max(0, last - 1)]
        planes = planes.index_select(axis, torch.tensor(index, device=planes.device))
    return planes


def _like_tiles(image: Tensor, bands: Bands) -> Iterator[Tensor]:
    """The positions of ``image [1, H, W, 3]`` in the tiles of ``bands``."""
    flat, start = image.reshape(-1, image.shape[-1]), 0
    for tile in bands.tiles():
        yield flat[start : start + len(tile)]
        start += len(tile)

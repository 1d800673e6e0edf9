"""Reassembly: 2x stages that predict a kernel for every output position. CARAFE and SAPA share it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import Taps, interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, as_guidance, row_slices
from featup.upsamplers.joint import resize_guidance
from featup.upsamplers.learned import LearnedUpsampler

__all__ = ["Reassembly"]


class Reassembly(LearnedUpsampler):
    """2x stages in which each output vector is a weighted mean of the 5x5 window around its parent.

    The parent of an output position is the low-resolution position that covers it, and has four children. They share
    its window, so a stage is four adaptive convolutions of the low-resolution map, one per child, and nothing is
    unfolded. A stage whose target is smaller than twice its input interpolates the 2x map to the target, bilinearly,
    row tile by row tile. The border values are replicated, so that a constant map stays constant.

    Each module in :attr:`stages` maps the compressed features ``[1, h + 4, w + 4, width]``, the image
    ``[1, 2h + 2, 2w + 2, 3]``, ``h`` and ``w`` to the kernels' logits ``[1, h, w, 2, 2, taps]``.
    """

    radius = 2
    taps = (2 * radius + 1) ** 2

    def __init__(self, channels: int, width: int, tile_pixels: int | None) -> None:
        super().__init__(channels, tile_pixels)
        self.width = width
        self.compress = nn.Linear(channels, width)
        self.stages: nn.ModuleList

    def mapped_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_row_tiles`."""
        values = features if channel_map is None else functional.linear(features, channel_map.weight)
        for rows, tile in self.operator_row_tiles(features, values, guidance, size):
            yield rows, tile if channel_map is None else tile + channel_map.bias

    def operator_row_tiles(
        self, features: Tensor, values: Tensor, guidance: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.operator_row_tiles`. Only the maps before the last stage are held as a whole."""
        sizes = self.stages_to(features, size, len(self.stages))
        guidance = as_guidance(guidance, features.dtype)
        compressed = self.compress(features)
        for stage, stage_size in enumerate(sizes[:-1]):
            tiles = self._stage_row_tiles(stage, compressed, [values, compressed], guidance, stage_size)
            values, compressed = (torch.cat(parts, 1) for parts in zip(*(maps for _, maps in tiles), strict=True))
        if sizes:
            last = self._stage_row_tiles(len(sizes) - 1, compressed, [values], guidance, size)
        else:
            # Without a stage this may be the caller's own tensor, which must not be written to.
            last = iter([(slice(0, size[0]), [values.clone()])])
        for rows, (tile,) in last:
            yield rows, tile

    def _stage_row_tiles(
        self, stage: int, compressed: Tensor, maps: Sequence[Tensor], guidance: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """The tile's rows and, for each of ``maps``, the stage's result in them."""
        _, height, width, _ = compressed.shape
        reach = self.radius
        down, across = (_replicating_taps(side, reach) for side in (height, width))
        image = resize_guidance(guidance, (2 * height, 2 * width))
        image = resample(image, _replicating_taps(2 * height, 1), _replicating_taps(2 * width, 1))
        exactly_twice = size == (2 * height, 2 * width)
        down_fine = interpolation_taps("bilinear", 2 * height, size[0])
        across_fine = interpolation_taps("bilinear", 2 * width, size[1])
        for rows in row_slices(size, self.tile_pixels, compressed.device):
            # From the rows of the result to the rows of the 2x map that they read, and to the parents of these.
            fine = down_fine[rows]
            needed = fine.index[fine.weight != 0]
            first, stop = int(needed.min()) // 2, int(needed.max()) // 2 + 1
            halo = down[first : stop + 2 * reach]
            logits = self.stages[stage](
                resample(compressed, halo, across), image[:, 2 * first : 2 * stop + 2], stop - first, width
            )
            kernels = logits.softmax(-1).unflatten(-1, (2 * reach + 1, 2 * reach + 1))
            children = [_children(resample(values, halo, across), kernels) for values in maps]
            if exactly_twice:
                within = slice(rows.start - 2 * first, rows.stop - 2 * first)
                yield rows, [values[:, within] for values in children]
            else:
                # A tap of weight zero may read the row after the last needed row.
                index = (fine.index - 2 * first).clamp(max=2 * (stop - first) - 1)
                fine = Taps(index, fine.weight, 2 * (stop - first))
                yield rows, [resample(values, fine, across_fine) for values in children]


def _replicating_taps(size: int, reach: int) -> Taps:
    """Taps that copy an axis and repeat its end values ``reach`` times."""
    index = torch.arange(-reach, size + reach).clamp(0, size - 1)[:, None]
    return Taps(index, torch.ones(index.shape), size)


def _children(padded: Tensor, kernels: Tensor) -> Tensor:
    """``[1, h + 2r, w + 2r, C]`` and ``[1, h, w, 2, 2, 2r + 1, 2r + 1]`` to the 2x map ``[1, 2h, 2w, C]``."""
    rows = [
        torch.stack([adaptive_conv(padded, kernels[:, :, :, i, j]) for j in range(2)], 3).flatten(2, 3)
        for i in range(2)
    ]
    return torch.stack(rows, 2).flatten(1, 2)

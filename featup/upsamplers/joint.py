"""The base of all joint bilateral upsamplers: 2x stages over windows, computed in row tiles that bound the memory.

A stage (FeatUp, section 3.2) interpolates the features to the stage's size and replaces every vector by a weighted
sum over the window around it. The weights come from the image at that size. They take 49 numbers a pixel, so a stage
works in row tiles and holds the weights of one tile at a time.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import Taps, interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, norm_preserving_mean, row_slices, stage_sizes

__all__ = ["JointUpsampler", "resize_guidance"]


class JointUpsampler(Upsampler):
    """A stack of joint bilateral stages. Sub-classes compute a tile's filters from the guidance channels.

    The guidance channels of a stage are the image's colours and, if the sub-class has them, affinity features: a few
    channels computed from the coarse features, so that the filters compare features as well as colours.
    """

    same_resolution_stages = 0
    """How many stages filter the coarse features at their own size, before the 2x stages."""

    def __init__(self, radius: int, tile_pixels: int | None) -> None:
        """
        Args:
            radius: The window is ``2 * radius + 1`` positions wide and high.
            tile_pixels: Most output positions whose filters are held at once, by default chosen for the device;
                the memory a stage needs beside its output is about ``tile_pixels * (4 * window + channels) * 4``
                bytes.

        Raises:
            GeometryError: a radius below one.
        """
        super().__init__()
        if radius < 1:
            raise GeometryError(f"{self.name}: radius={radius} leaves no window; it must be at least 1")
        self.radius = radius
        self.tile_pixels = tile_pixels

    def filters(self, stage: int, padded_guidance: Tensor) -> Tensor:
        """Filters of one row tile.

        Args:
            stage: Number of the 2x stage, from 0; negative for the same-resolution stages before them.
            padded_guidance: ``[1, h + 2r, w + 2r, 3 + D]``: the tile and its surroundings. The colours are scaled by
                :meth:`prepare_guidance`; the ``D`` channels of :meth:`affinity_features` follow, if there are any.

        Returns:
            ``[1, h, w, 2r + 1, 2r + 1]``.
        """
        raise NotImplementedError

    def stage_filters(self, stage: int) -> Callable[[Tensor], Tensor]:
        """The function that computes the filters of a stage's row tiles, :meth:`filters` by default.

        It is asked for once for each image and stage. A sub-class samples here what all tiles share.
        """
        return partial(self.filters, stage)

    def check_stages(self, count: int, low: tuple[int, int], high: tuple[int, int]) -> None:
        """Raise if ``count`` 2x stages from ``low`` to ``high`` cannot be served; by default all can."""

    def prepare_guidance(self, guidance: Tensor) -> Tensor:
        """Scale colours in [0, 1] as the filters take them."""
        return guidance

    def affinity_features(self, features: Tensor) -> Tensor | None:
        """Channels that the filters compare beside the colours: ``[1, h, w, C]`` to ``[1, h, w, D]``; by default none.

        Args:
            features: The coarse features, before any channel map.
        """
        return None

    def mapped_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_row_tiles`.

        The affinity features come from all channels, before the map. The same-resolution stages also filter all
        channels, because a norm-preserving mean is not linear.
        """
        guidance, affinity = self._prepare(features, guidance)
        for average in self._same_resolution_averages(features, guidance, affinity):
            features = norm_preserving_mean(average, features)
        if channel_map is None:
            yield from self._upsampled_row_tiles(features, guidance, size, affinity)
            return
        mapped = functional.linear(features, channel_map.weight)
        for rows, tile in self._upsampled_row_tiles(mapped, guidance, size, affinity):
            yield rows, tile + channel_map.bias if torch.is_grad_enabled() else tile.add_(channel_map.bias)

    def operator_row_tiles(
        self, features: Tensor, values: Tensor, guidance: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.operator_row_tiles`. The filters compare the features; means do not rescale values."""
        guidance, affinity = self._prepare(features, guidance)
        for average in self._same_resolution_averages(features, guidance, affinity):
            values = average(values)
        yield from self._upsampled_row_tiles(values, guidance, size, affinity)

    def _prepare(self, features: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor | None]:
        """The colours and the affinity features that the filters compare."""
        prepared = self.prepare_guidance(as_guidance(guidance, features.dtype))
        return prepared, self.affinity_features(features)

    def _same_resolution_averages(
        self, features: Tensor, guidance: Tensor, affinity: Tensor | None
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """The weighted means of the same-resolution stages, the first first, with the same weights for all channels."""
        if self.same_resolution_stages:
            guidance = resize_guidance(guidance, (features.shape[1], features.shape[2]))
        for stage in range(-self.same_resolution_stages, 0):
            yield partial(self.run_stage, stage, guidance=guidance, affinity=affinity)

    def row_tiles(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.row_tiles`. Only the maps before the last stage are held as a whole."""
        return self.mapped_row_tiles(features, guidance, size, None)

    def _upsampled_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], affinity: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The 2x stages, the last one in row tiles."""
        low = (features.shape[1], features.shape[2])
        sizes = stage_sizes(low, size)
        self.check_stages(len(sizes), low, size)
        for stage, stage_size in enumerate(sizes[:-1]):
            features = self.run_stage(stage, features, resize_guidance(guidance, stage_size), affinity)
        if sizes:
            yield from self._stage_row_tiles(len(sizes) - 1, features, resize_guidance(guidance, size), affinity)
        else:
            # Without a stage this may be the caller's own tensor, which must not be written to.
            yield slice(0, size[0]), features.clone()

    def run_stage(self, stage: int, features: Tensor, guidance: Tensor, affinity: Tensor | None = None) -> Tensor:
        """One stage: ``features [B, h, w, C]`` to the size of the prepared ``guidance [B, H, W, 3]``.

        ``affinity [B, h', w', D]``, of any size, are those of :meth:`affinity_features`.
        """
        if torch.is_grad_enabled():
            return torch.cat([tile for _, tile in self._stage_row_tiles(stage, features, guidance, affinity)], 1)
        whole = features.new_empty(len(features), *guidance.shape[1:3], features.shape[3])
        for _ in self._stage_row_tiles(stage, features, guidance, affinity, whole):
            pass
        return whole

    def _stage_row_tiles(
        self, stage: int, features: Tensor, guidance: Tensor, affinity: Tensor | None, whole: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The result of one stage in row tiles, written into ``whole`` if given."""
        _, height, width, _ = guidance.shape
        reach = 2 * self.radius
        padded_guidance = _PaddedGuidance(guidance, affinity, self.radius)
        down, across = (
            interpolation_taps("bicubic", low, high, self.radius)
            for low, high in zip(features.shape[1:3], (height, width), strict=True)
        )
        filters_of = self.stage_filters(stage)
        for rows in row_slices((height, width), self.tile_pixels, features.device):
            halo = slice(rows.start, rows.stop + reach)
            source = resample(features, down[halo], across)
            filters = filters_of(padded_guidance.rows(halo))
            yield rows, adaptive_conv(source, filters, out=None if whole is None else whole[:, rows])


class _PaddedGuidance:
    """The guidance channels of a stage, reflected at their border like the interpolated features.

    Affinity features are interpolated from the coarse grid for the rows that are asked for: at the stage's size all of
    them would take more memory than the image.
    """

    def __init__(self, colours: Tensor, affinity: Tensor | None, radius: int) -> None:
        size = (colours.shape[1], colours.shape[2])
        above, beside = (interpolation_taps("nearest", side, side, reflect=radius) for side in size)
        self._colours = resample(colours, above, beside)
        self._affinity = affinity
        if affinity is not None:
            taps = (interpolation_taps("bilinear", affinity.shape[axis + 1], size[axis]) for axis in (0, 1))
            self._rows, self._columns = (
                Taps(inside.index[at.index[:, 0]], inside.weight[at.index[:, 0]], inside.size)
                for inside, at in zip(taps, (above, beside), strict=True)
            )

    def rows(self, part: slice) -> Tensor:
        """Rows of the padded map: ``[B, rows, W + 2r, 3 + D]``."""
        colours = self._colours[:, part]
        if self._affinity is None:
            return colours
        return torch.cat([colours, resample(self._affinity, self._rows[part], self._columns)], -1)


def resize_guidance(guidance: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W, 3]`` to ``[B, *size, 3]``: the mean over each cell to go down, bilinear to go up."""
    if (guidance.shape[1], guidance.shape[2]) == size:
        return guidance
    planes = guidance.permute(0, 3, 1, 2).contiguous()
    if size[0] <= guidance.shape[1] and size[1] <= guidance.shape[2]:
        planes = functional.adaptive_avg_pool2d(planes, size)
    else:
        planes = functional.interpolate(planes, size, mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1)

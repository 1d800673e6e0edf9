"""The base of all joint bilateral upsamplers: 2x stages over windows, computed in row tiles that bound the memory.

A stage (FeatUp, section 3.2) interpolates the features to the stage's size and replaces every vector by a weighted
sum over the window around it. The weights come from the image at that size. They take 49 numbers a pixel, so a stage
works in row tiles and holds the weights of one tile at a time.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import BICUBIC_A, interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, norm_preserving_mean, row_slices, stage_sizes

__all__ = ["JointUpsampler", "resize_guidance"]


class JointUpsampler(Upsampler):
    """A stack of joint bilateral stages. Sub-classes compute a tile's filters from the guidance channels.

    The guidance channels of a stage are the image's colours and, if the sub-class has them, affinity features: a few
    channels computed from the coarse features, so that the filters compare features as well as colours.
    """

    same_resolution_stages = 0
    """How many stages filter the coarse features at their own size, before the 2x stages."""
    bicubic_a = BICUBIC_A
    """Keys' ``a`` of the interpolation inside a stage; see :func:`featup.kernels.resample.interpolation_taps`."""

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
        guidance = self.prepare_guidance(as_guidance(guidance, features.dtype))
        affinity = self.affinity_features(features)
        low = (features.shape[1], features.shape[2])
        coarse_guidance = _guidance_channels(guidance, affinity, low) if self.same_resolution_stages else guidance
        for stage in range(-self.same_resolution_stages, 0):
            features = norm_preserving_mean(partial(self.run_stage, stage, guidance=coarse_guidance), features)
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
        guidance = self.prepare_guidance(as_guidance(guidance, features.dtype))
        affinity = self.affinity_features(features)
        if self.same_resolution_stages:
            coarse_guidance = _guidance_channels(guidance, affinity, (features.shape[1], features.shape[2]))
            for stage in range(-self.same_resolution_stages, 0):
                values = self.run_stage(stage, values, coarse_guidance)
        yield from self._upsampled_row_tiles(values, guidance, size, affinity)

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
            features = self.run_stage(stage, features, _guidance_channels(guidance, affinity, stage_size))
        if sizes:
            yield from self._stage_row_tiles(len(sizes) - 1, features, _guidance_channels(guidance, affinity, size))
        else:
            # Without a stage this may be the caller's own tensor, which must not be written to.
            yield slice(0, size[0]), features.clone()

    def run_stage(self, stage: int, features: Tensor, guidance: Tensor) -> Tensor:
        """One stage: ``features [B, h, w, C]`` to the size of the prepared ``guidance [B, H, W, 3 + D]``."""
        if torch.is_grad_enabled():
            return torch.cat([tile for _, tile in self._stage_row_tiles(stage, features, guidance)], 1)
        whole = features.new_empty(len(features), *guidance.shape[1:3], features.shape[3])
        for _ in self._stage_row_tiles(stage, features, guidance, whole):
            pass
        return whole

    def _stage_row_tiles(
        self, stage: int, features: Tensor, guidance: Tensor, whole: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The result of one stage in row tiles, written into ``whole`` if given."""
        _, height, width, _ = guidance.shape
        reach = 2 * self.radius
        # The guidance is reflected at its border like the interpolated features.
        above, beside = (interpolation_taps("nearest", side, side, reflect=self.radius) for side in (height, width))
        padded = resample(guidance, above, beside)
        down, across = (
            interpolation_taps("bicubic", low, high, self.radius, self.bicubic_a)
            for low, high in zip(features.shape[1:3], (height, width), strict=True)
        )
        for rows in row_slices((height, width), self.tile_pixels, features.device):
            halo = slice(rows.start, rows.stop + reach)
            source = resample(features, down[halo], across)
            filters = self.filters(stage, padded[:, halo])
            yield rows, adaptive_conv(source, filters, out=None if whole is None else whole[:, rows])


def _guidance_channels(guidance: Tensor, affinity: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Colours at ``size`` and, after them, affinity features interpolated from the coarse grid."""
    guidance = resize_guidance(guidance, size)
    if affinity is None:
        return guidance
    rows, cols = (interpolation_taps("bilinear", affinity.shape[axis + 1], size[axis]) for axis in (0, 1))
    return torch.cat([guidance, resample(affinity, rows, cols)], -1)


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

"""What all joint bilateral upsamplers share: 2x stages, windows, and bands that bound the memory.

A stage (FeatUp, section 3.2) interpolates the features to the stage's size and replaces every vector by a weighted
sum over the window around it; the weights come from the image at that size. Weights for a whole map are 49 numbers
a pixel, so a stage works in bands of rows and holds one band's weights at a time.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import BICUBIC_A, interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, keeping_lengths, row_bands, stage_sizes

__all__ = ["JointUpsampler", "resize_guidance"]


class JointUpsampler(Upsampler):
    """A stack of joint stages. Sub-classes say how a band's filters follow from the guidance."""

    coarse_stages = 0
    """How many stages at the features' own size come before the doublings."""
    bicubic_a = BICUBIC_A
    """Of the interpolation inside a stage; see :func:`featup.kernels.resample.interpolation_taps`."""

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
        """Filters of one band.

        Args:
            stage: How many doublings have gone before; negative before the first, in a stage that keeps the size.
            padded_guidance: ``[1, h + 2r, w + 2r, 3]``, the band with its surroundings, as :meth:`prepare_guidance`
                left it; then the channels of :meth:`keys`, if there are any.

        Returns:
            ``[1, h, w, 2r + 1, 2r + 1]``.
        """
        raise NotImplementedError

    def check_stages(self, count: int, low: tuple[int, int], high: tuple[int, int]) -> None:
        """Raise if ``count`` stages from ``low`` to ``high`` cannot be served; by default all can."""

    def prepare_guidance(self, guidance: Tensor) -> Tensor:
        """From [0, 1] to the scale the filters are made for."""
        return guidance

    def keys(self, features: Tensor) -> Tensor | None:
        """What the filters shall know of the features: ``[1, h, w, D]`` from ``[1, h, w, C]``; by default nothing."""
        return None

    def mapped_bands(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_bands`. The filters come from the features as they were before the map, and the
        stages at the features' own size run on all channels: keeping lengths is not linear."""
        guidance = self.prepare_guidance(as_guidance(guidance, features.dtype))
        keys = self.keys(features)
        low = (features.shape[1], features.shape[2])
        guide = _guide(guidance, keys, low) if self.coarse_stages else guidance
        for stage in range(-self.coarse_stages, 0):
            features = keeping_lengths(partial(self.run_stage, stage, guidance=guide), features)
        if total is None:
            yield from self._doublings(features, guidance, size, keys)
            return
        mapped = functional.linear(features, total.weight)
        for rows, linear in self._doublings(mapped, guidance, size, keys):
            yield rows, linear + total.bias if torch.is_grad_enabled() else linear.add_(total.bias)

    def bands(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.bands`. The last stage's map is never whole, only the smaller ones before it."""
        return self.mapped_bands(features, guidance, size, None)

    def _doublings(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], keys: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        low = (features.shape[1], features.shape[2])
        sizes = stage_sizes(low, size)
        self.check_stages(len(sizes), low, size)
        for stage, stage_size in enumerate(sizes[:-1]):
            features = self.run_stage(stage, features, _guide(guidance, keys, stage_size))
        if sizes:
            yield from self._stage_bands(len(sizes) - 1, features, _guide(guidance, keys, size))
        else:
            # No stage to run: this may be the caller's own tensor, which must not be written to.
            yield slice(0, size[0]), features.clone()

    def run_stage(self, stage: int, features: Tensor, guidance: Tensor) -> Tensor:
        """One stage: ``features [B, h, w, C]`` to the size of the prepared ``guidance [B, H, W, 3 + D]``."""
        if torch.is_grad_enabled():
            return torch.cat([band for _, band in self._stage_bands(stage, features, guidance)], 1)
        whole = features.new_empty(len(features), *guidance.shape[1:3], features.shape[3])
        for _ in self._stage_bands(stage, features, guidance, whole):
            pass
        return whole

    def _stage_bands(
        self, stage: int, features: Tensor, guidance: Tensor, whole: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        _, height, width, _ = guidance.shape
        reach = 2 * self.radius
        # The guidance reaches beyond its border by the same reflection as the interpolated features.
        above, beside = (interpolation_taps("nearest", side, side, reflect=self.radius) for side in (height, width))
        padded = resample(guidance, above, beside)
        down, across = (
            interpolation_taps("bicubic", held, side, self.radius, self.bicubic_a)
            for held, side in zip(features.shape[1:3], (height, width), strict=True)
        )
        for rows in row_bands((height, width), self.tile_pixels, features.device):
            halo = slice(rows.start, rows.stop + reach)
            source = resample(features, down[halo], across)
            filters = self.filters(stage, padded[:, halo])
            yield rows, adaptive_conv(source, filters, out=None if whole is None else whole[:, rows])


def _guide(guidance: Tensor, keys: Tensor | None, size: tuple[int, int]) -> Tensor:
    """What a stage of ``size`` is guided by: colours, and keys interpolated from the features' grid."""
    guidance = resize_guidance(guidance, size)
    if keys is None:
        return guidance
    rows, cols = (interpolation_taps("bilinear", keys.shape[axis + 1], size[axis]) for axis in (0, 1))
    return torch.cat([guidance, resample(keys, rows, cols)], -1)


def resize_guidance(guidance: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W, 3]`` to ``[B, *size, 3]``: the mean over each cell going down, bilinear going up."""
    if (guidance.shape[1], guidance.shape[2]) == size:
        return guidance
    planes = guidance.permute(0, 3, 1, 2).contiguous()
    if size[0] <= guidance.shape[1] and size[1] <= guidance.shape[2]:
        planes = functional.adaptive_avg_pool2d(planes, size)
    else:
        planes = functional.interpolate(planes, size, mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1)

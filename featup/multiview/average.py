"""Multi-view averages: shifted and flipped views of an image, averaged on the grid of its coarse features.

The method ``multiview`` is ours and has no paper. It is test-time augmentation: the backbone's features of shifted
views differ by noise that depends on where its patches lie. Their average, rescaled to the norms of the features, is
brought up by any feed-forward upsampler, and back-projection restores what that removes although the views agree on it
(see :mod:`featup.multiview.back_projection`). Nothing is fitted but the blend weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.kernels.resample import Taps, resample
from featup.multiview.back_projection import add_residual, blend_weight, predict_views, residual_of, view_consistency
from featup.multiview.field import FeatureField, PerImageUpsampler
from featup.multiview.options import MultiViewOptions
from featup.multiview.view_features import image_generator, view_features
from featup.multiview.views import View, check_view, to_view_axis
from featup.projection import orthonormal_directions
from featup.upsamplers.base import ChannelMap, Upsampler, norm_preserving_mean
from featup.upsamplers.interpolate import Interpolate

__all__ = ["MultiView", "MultiViewField", "MultiViewOptions", "average_views"]

# Of a map, of the channels that are corrected together.
_PART_BYTES = 1 << 27


@dataclass(frozen=True, eq=False)
class MultiViewField(FeatureField):
    """The upsampled multi-view average of an image as a feature field.

    Attributes:
        base: The feed-forward upsampler.
        features: ``[1, h, w, C]``, which the base upsamples: the average, rescaled to the norms of the features.
        average: ``[1, h, w, C]``: the average itself, which explains the views best.
        guidance: uint8 ``[1, H, W, 3]``.
        blend_weight: Of the upsampled residual, 0 to 1.
    """

    base: Upsampler
    features: Tensor
    average: Tensor
    guidance: Tensor
    blend_weight: float

    @torch.no_grad()
    def query(self, size: tuple[int, int], projection: ChannelMap | None = None, out: Tensor | None = None) -> Tensor:
        """See :meth:`FeatureField.query`."""
        if not self.blend_weight:
            upsampled: Tensor = self.base(
                self.features, self.guidance, size, projection, None if out is None else out[None]
            )
            return upsampled[0]
        channel_map = projection or ChannelMap.without_bias(torch.eye(self.features.shape[-1]).to(self.features))
        if out is None:
            out = self.features.new_empty(*size, len(channel_map.bias))
        # Some channels at a time: the correction needs the whole map of each.
        count = max(1, _PART_BYTES // (4 * size[0] * size[1]))
        parts = zip(torch.split(channel_map.weight, count), torch.split(channel_map.bias, count), strict=True)
        for start, part in zip(range(0, out.shape[-1], count), parts, strict=True):
            part_map = ChannelMap(*part).to(self.features)
            values = self.base(self.features, self.guidance, size, part_map)
            residual = residual_of(self.average, values, part_map)
            out[..., start : start + count].copy_(add_residual(values, residual, self.blend_weight)[0])
        return out


class MultiView(PerImageUpsampler):
    """Averages views of each image and brings the average up; see the module."""

    name = "multiview"

    def __init__(self, backbone: Backbone, base: Upsampler, options: MultiViewOptions | None = None) -> None:
        """
        Args:
            backbone: Of the features; it computes the features of the views.
            base: The feed-forward upsampler.
            options: See :class:`MultiViewOptions`.
        """
        super().__init__(backbone)
        self.base = base
        self.options = options or MultiViewOptions()

    def largest(self, low: tuple[int, int]) -> tuple[int, int] | None:
        """See :meth:`Upsampler.largest`."""
        return self.base.largest(low)

    @torch.no_grad()
    def field(self, features: Tensor, image: Tensor, guidance: Tensor) -> MultiViewField:
        """See :meth:`PerImageUpsampler.field`.

        The blend weight and the explained variances are computed on random projections of the channels, the same for
        all images: they do not depend on the channels that are asked for.
        """
        options, size = self.options, (image.shape[1], image.shape[2])
        views = options.jitter.sample(options.views + options.held_out, size, image_generator(options.seed, image))
        maps = view_features(self.backbone, image, views, options.max_pad)
        training = slice(options.training_views)
        averages = partial(
            average_views,
            views=[options.jitter.identity, *views[training]],
            max_pad=options.max_pad,
            image_size=size,
            sigma=options.sigma,
        )
        of_image = torch.cat([features, maps[training]])
        average, rescaled = averages(of_image)[None], norm_preserving_mean(averages, of_image)[None]
        field = MultiViewField(None, None, self.base, rescaled, average, guidance, 0.0)
        validation = slice(options.training_views, options.views)
        if not (options.validation_views or options.held_out):
            return field
        seeded = torch.Generator().manual_seed(options.seed)
        directions = orthonormal_directions(options.directions, features.shape[-1], seeded).to(features)
        channel_map = ChannelMap.without_bias(directions)
        targets = maps @ directions.T
        initial = self.base(rescaled, image, size, channel_map)
        residual = residual_of(average, initial, channel_map)
        baseline = Interpolate("bilinear")(features, image, size, channel_map)
        weight = 0.0
        if options.validation_views:
            grid = (targets.shape[1], targets.shape[2])
            predicted = (
                predict_views(candidate[0], views[validation], grid, options.jitter)
                for candidate in (initial, add_residual(initial, residual, 1.0), baseline)
            )
            weight = blend_weight(options.margin, targets[validation], *predicted)
        explained: list[float | None] = [None, None]
        if options.held_out:
            held_out = views[options.views :], targets[options.views :], options.jitter
            final = add_residual(initial, residual, weight)
            explained = [float(view_consistency(candidate[0], *held_out)) for candidate in (final, baseline)]
        return MultiViewField(explained[0], explained[1], self.base, rescaled, average, guidance, weight)


def average_views(
    maps: Tensor, views: Sequence[View], max_pad: int, image_size: tuple[int, int], sigma: float
) -> Tensor:
    """Multi-view average: the coarse maps of an image's views, averaged on the grid of the image.

    For every cell of the grid, the vectors of all views within one cell of its centre, down and across, are averaged.
    A vector at distance ``d``, in cells of its view, has weight ``exp(-d^2 / (2 sigma^2))``: the Nadaraya-Watson
    estimate of the features of a patch centred there. Vectors of the reflected border are ignored.

    Args:
        maps: Of the views, ``[V, h, w, C]``.
        views: One for each map. With the identity among them, every cell has a vector.
        max_pad: Of the jitter that the views were sampled from, in pixels of the image.
        image_size: (height, width) of the image, in pixels.
        sigma: Of the weights, in cells of a view, above 0.

    Returns:
        ``[h, w, C]``; NaN in cells that no view covers.

    Raises:
        GeometryError: maps that are not as many as there are views, a view that reaches beyond the padded image, or a
            sigma that is not positive.
    """
    if maps.dim() != 4 or len(maps) != len(views) or not sigma > 0:
        raise GeometryError(
            f"average_views: need maps [V, h, w, C], one view for each and a positive sigma, got {tuple(maps.shape)}, "
            f"{len(views)} views and sigma={sigma}"
        )
    grid = (maps.shape[1], maps.shape[2])
    total, weight = maps.new_zeros(1, *grid, maps.shape[3]), maps.new_zeros(grid)
    for number, view in enumerate(views):
        check_view(view, image_size, max_pad)
        rows = _averaging_taps(grid[0], image_size[0], view.zoom, view.top, False, max_pad, sigma)
        cols = _averaging_taps(grid[1], image_size[1], view.zoom, view.left, view.flip, max_pad, sigma)
        total = total + resample(maps[number : number + 1], rows, cols)
        weight = weight + (rows.weight.sum(1)[:, None] * cols.weight.sum(1)).to(weight)
    return (total / weight[..., None])[0]


def _averaging_taps(cells: int, side: int, zoom: float, offset: int, flip: bool, max_pad: int, sigma: float) -> Taps:
    """Taps into an axis of a view's cells for the cells of the image's own: the weights of :func:`average_views`."""
    at = (torch.arange(cells, dtype=torch.float64) + 0.5) * (side / cells) - 0.5
    at, inside = to_view_axis(at, side, zoom, offset, flip, max_pad)
    place = (at + 0.5) * (cells / side) - 0.5
    index = place.floor()[:, None] + torch.tensor([0, 1])
    distance = (index - place[:, None]).abs()
    used = inside[:, None] & (index >= 0) & (index < cells) & (distance < 1)
    weight = torch.exp(-0.5 * (distance / sigma).square()) * used
    return Taps(index.clamp(0, cells - 1).long(), weight.float(), cells)

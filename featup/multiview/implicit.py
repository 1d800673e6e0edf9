"""The implicit upsampler: a network fitted to each image from jittered views of it (FeatUp, section 3.3).

The network maps a position and its colour to a feature: the map is absolute, and no coarse feature enters it. The fit
is described in :mod:`featup.multiview.fitting`. Its numbers are those of the paper (:data:`PAPER`), or it has fewer
views and the closed form of the network's last layer in place of steps (:data:`FAST`); steps that are asked for then
sample tokens of views and positions in their windows, as a NeRF samples rays.

The network works in the space of a PCA: that of a data set, or of the features of the image's own views, as in the
paper.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.kernels.resample import interpolation_taps, resample
from featup.multiview.back_projection import view_consistency
from featup.multiview.field import FeatureField, PerImageUpsampler
from featup.multiview.fitting import FitModel, fit_steps, views_explained
from featup.multiview.network import pixel_coordinates
from featup.multiview.options import FAST, PAPER, ImplicitOptions
from featup.multiview.view_features import image_generator, view_features
from featup.projection import PCA, PCAFit
from featup.upsamplers.base import ChannelMap, as_guidance, row_slices
from featup.upsamplers.interpolate import Interpolate

__all__ = ["FAST", "PAPER", "Fit", "Implicit", "ImplicitField", "ImplicitOptions"]

_TILE_PIXELS = 1 << 14
# Of the views, whose features the PCA of an image is fitted to.
_PCA_VIEWS = 50


@dataclass(frozen=True, eq=False)
class ImplicitField(FeatureField):
    """A fitted network as a feature field.

    Attributes:
        model: What was fitted.
        pca: The space of the network's output.
        guidance: uint8 ``[1, H, W, 3]``.
        size: (height, width) of the image that the network was fitted to.
        colour_range: Lowest and highest colour of that image, ``[2, 3]``.
    """

    model: FitModel
    pca: PCA
    guidance: Tensor
    size: tuple[int, int]
    colour_range: Tensor

    @torch.no_grad()
    def query(self, size: tuple[int, int], projection: ChannelMap | None = None, out: Tensor | None = None) -> Tensor:
        """See :meth:`FeatureField.query`. The features lie in the span of the PCA."""
        image = as_guidance(self.guidance, torch.float32)
        channel_map = ChannelMap(self.pca.components.T, self.pca.mean).to(image)
        if projection is not None:
            channel_map = projection.to(image).after(channel_map)
        if out is None:
            out = image.new_empty(*size, len(channel_map.bias))
        rows, cols = (interpolation_taps("bilinear", image.shape[axis + 1], size[axis]) for axis in (0, 1))
        down, across = (self._coordinates(size[axis], axis) for axis in (0, 1))
        for tile in row_slices(size, _TILE_PIXELS, image.device):
            colours = _scaled(resample(image, rows[tile], cols)[0], self.colour_range)
            positions = torch.stack(torch.meshgrid(down[tile], across, indexing="ij"), -1)
            features = self.model.network(positions, colours)
            out[tile].copy_(torch.nn.functional.linear(features, channel_map.weight, channel_map.bias))
        return out

    @torch.no_grad()
    def uncertainty(self, features: Tensor) -> Tensor:
        """The predicted error between the field's and the backbone's features of a view (equation 2).

        Args:
            features: The backbone's, of the image or a view of it, ``[..., C]``.

        Returns:
            Standard deviation per component of the PCA, in the features' unit, ``[..., 1]``.
        """
        log_sigma: Tensor = self.model.log_sigma(self.pca.project(features))
        return log_sigma.exp()

    def _coordinates(self, count: int, axis: int) -> Tensor:
        """Of the centres of ``count`` positions along an axis of the image."""
        pixels = (torch.arange(count, device=self.guidance.device) + 0.5) * (self.size[axis] / count) - 0.5
        return pixel_coordinates(pixels, self.size[axis])


class Implicit(PerImageUpsampler):
    """Fits a network to each image; see the module."""

    name = "implicit"

    def __init__(self, backbone: Backbone, pca: PCA | None = None, options: ImplicitOptions = FAST) -> None:
        """
        Args:
            backbone: Of the features; it computes the features of the views.
            pca: Of the data set: the space of the networks' output. By default that of each image's own views.
            options: See :class:`ImplicitOptions`.
        """
        super().__init__(backbone)
        self.pca = pca
        self.options = options

    def field(self, features: Tensor, image: Tensor, guidance: Tensor) -> ImplicitField:
        """See :meth:`PerImageUpsampler.field`."""
        # The copies are no inference tensors, with which autograd could not fit.
        with torch.inference_mode(False), torch.enable_grad():
            fit = Fit(self.backbone, self.pca, self.options, image.clone())
            for _ in fit.steps():
                pass
        fit.model.requires_grad_(False)
        return fit.field(features, guidance)


class Fit:
    """The fit of one image: views, target features and the model.

    Attributes:
        image: uint8 ``[1, H, W, 3]``.
        pca: The space of the targets: that given, or that of the features of the first views.
        views, targets: All views, those held out last, and their features ``[V, h, w, K]``.
        colours: Of the image, scaled to [-0.5, 0.5], ``[H, W, 3]``.
        model: What is fitted.
    """

    def __init__(self, backbone: Backbone, pca: PCA | None, options: ImplicitOptions, image: Tensor) -> None:
        """
        Args:
            backbone, pca, options: See :class:`Implicit`.
            image: uint8 ``[1, H, W, 3]``.
        """
        self.options, self.image, self.size = options, image, (image.shape[1], image.shape[2])
        self._generator = image_generator(options.seed, image)
        self.views = options.jitter.sample(options.views + options.held_out, self.size, self._generator)
        targets = []
        # Never all channels of all views at once: they would take gigabytes.
        for start in range(0, len(self.views), _PCA_VIEWS):
            maps = view_features(backbone, image, self.views[start : start + _PCA_VIEWS], options.max_pad)
            if pca is None:
                vectors = PCAFit(maps.shape[-1])
                vectors.add(maps)
                pca = vectors.solve(min(options.components, maps.shape[-1], vectors.count - 1))
            targets.append(pca.project(maps))
        assert pca is not None
        self.pca, self.targets = pca, torch.cat(targets)
        floating = as_guidance(image, torch.float32)
        self._colour_range = torch.stack([floating.amin((0, 1, 2)), floating.amax((0, 1, 2))])
        self.colours = _scaled(floating[0], self._colour_range)
        _, height, width, channels = self.targets.shape
        self.model = FitModel(channels, (height, width), self.size, options, self._generator).to(image.device)

    def steps(self) -> Iterator[int]:
        """Fit the model; see :func:`featup.multiview.fitting.fit_steps`."""
        training = slice(self.options.views)
        views, targets = self.views[training], self.targets[training]
        yield from fit_steps(self.model, self.options, self.colours, views, targets, self._generator)

    def field(self, features: Tensor, guidance: Tensor) -> ImplicitField:
        """The feature field of the model as it is.

        Args:
            features: The image's coarse features ``[1, h, w, C]``.
            guidance: The image, uint8 ``[1, H, W, 3]``, at this size or larger.
        """
        field = ImplicitField(None, None, self.model, self.pca, guidance, self.size, self._colour_range)
        held_out = slice(self.options.views, None)
        views, targets = self.views[held_out], self.targets[held_out]
        channel_map = self.pca.as_channel_map().to(self.targets)
        maps = replace(field, guidance=self.image).query(self.size, channel_map)
        baseline = Interpolate("bilinear")(features, self.image, self.size, channel_map)[0]
        return replace(
            field,
            explained_variance=views_explained(self.model, maps, views, targets, self.options.max_pad),
            baseline_explained_variance=float(view_consistency(baseline, views, targets, self.options.jitter)),
        )


def _scaled(colours: Tensor, colour_range: Tensor) -> Tensor:
    """Colours ``[..., 3]`` scaled to [-0.5, 0.5] between a lowest and a highest ``[2, 3]``."""
    lowest, highest = colour_range
    scaled: Tensor = (colours - lowest) / (highest - lowest).clamp_min(1e-4) - 0.5
    return scaled

"""The multi-view objective (FeatUp, sections 3.1 and 3.2).

Features are upsampled to the size of the image, warped by a jittered view, and downsampled by a learned model of the
backbone's patch. The result must match the backbone's features of that view.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.multiview.views import Jitter, View, warp
from featup.training.losses import (
    magnitude,
    reconstruction,
    sample_positions,
    sampled_crf,
    total_variation,
)
from featup.training.objective import Objective, Purpose, seeded
from featup.upsamplers import ChannelMap, Upsampler
from featup.upsamplers.base import as_guidance, normalise_colours
from featup.upsamplers.jbu import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["LogSigma", "MultiViewObjective"]

_LEAST_SIGMA = 1e-4


class LogSigma(nn.Module):
    """The uncertainty of equation 2: a linear map of a view's features to the log sigma of each of its cells.

    The features are normalised over their channels, which does nothing to features of ``norm=layer``, those of the
    original. For others it keeps the initial sigma near 1, whatever their scale.
    """

    def __init__(self, channels: int) -> None:
        """
        Args:
            channels: C of the features.
        """
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        with torch.no_grad():
            # As the original: at first the sigma hardly depends on the features.
            self.linear.weight.mul_(0.1)
            self.linear.bias.mul_(0.1)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, h, w, C]`` to ``[B, h, w, 1]``."""
        log_sigma: Tensor = self.linear(functional.layer_norm(features, features.shape[-1:])) + 0.1
        return log_sigma.clamp_min(math.log(_LEAST_SIGMA))


class _Comparison(NamedTuple):
    """One view of each image: predicted and target features ``[B, h, w, P]``, and all channels of the target."""

    prediction: Tensor
    target: Tensor
    features: Tensor


class MultiViewObjective(Objective):
    """An upsampler, the downsampler that is trained with it, the uncertainty of the views, and their loss."""

    def __init__(
        self,
        upsampler: Upsampler,
        downsampler: AttentionDownsampler | BlurDownsampler,
        *,
        jitter: Jitter | None = None,
        jitters: int = 5,
        projections: int | None = 30,
        uncertainty: LogSigma | None = None,
        crf: float = 0.0,
        crf_positions: int = 1000,
        total_variation: float = 0.0,
        magnitude: float = 0.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            upsampler, projections, precision: See :class:`Objective`.
            downsampler: With the backbone's stride; its kernel may be larger.
            jitter: The distribution of the views.
            jitters: Views of every image in a step, at least 1.
            uncertainty: Predicts the log sigma of each view's cells, and is trained along; ``None`` for a plain mean
                squared error.
            crf, total_variation, magnitude: Weights of these terms; a term without weight is not computed. The CRF
                sums over the projections, as in the original.
            crf_positions: Number of positions of the sampled CRF.

        Raises:
            GeometryError: fewer than one view or projection.
        """
        super().__init__(upsampler, projections, precision)
        if jitters < 1:
            raise GeometryError(f"objective: jitters={jitters} must be at least 1")
        self.downsampler = downsampler
        self.jitter = jitter or Jitter()
        self.jitters = jitters
        self.uncertainty = uncertainty
        self.crf = crf
        self.crf_positions = crf_positions
        self.total_variation = total_variation
        self.magnitude = magnitude

    def forward(self, backbone: Backbone, images: Tensor, seed: int, step: int, first: int = 0) -> dict[str, Tensor]:
        """See :meth:`Objective.forward`; the loss is a weighted sum of the terms."""
        directions = self.directions(backbone, seeded(seed, Purpose.DIRECTIONS, step)).to(images.device)
        normalised = backbone.normalise(images).permute(0, 2, 3, 1)
        coarse, dropout = self.features(backbone, normalised), seeded(seed, Purpose.ATTENTION, step)
        upsampled = self._upsampled(coarse, images, directions, dropout)
        values = upsampled[..., : len(directions)]
        views = [
            self.jitter.sample(self.jitters, _size(images), seeded(seed, Purpose.VIEWS, step, first + place))
            for place in range(len(images))
        ]
        terms = {"reconstruction": values.new_zeros(())}
        weights = {"reconstruction": 1.0}
        if self.magnitude:
            terms["magnitude"], weights["magnitude"] = values.new_zeros(()), self.magnitude
        kept = self._kept(backbone.grid(_size(images)), len(images), seed, step, first)
        for prediction, target, features in self._comparisons(backbone, normalised, upsampled, directions, views, kept):
            log_sigma = None if self.uncertainty is None else self.uncertainty(features)
            error = reconstruction(prediction, target, log_sigma)
            terms["reconstruction"] = terms["reconstruction"] + error / self.jitters
            if self.magnitude:
                # Sums over the projections are smaller by their share than sums over all channels.
                difference = magnitude(prediction, target) * backbone.channels / len(directions)
                terms["magnitude"] = terms["magnitude"] + difference / self.jitters
        if self.crf:
            positions = sample_positions(_size(images), self.crf_positions, seeded(seed, Purpose.CRF, step))
            rows, cols = (axis.to(images.device) for axis in positions)
            terms["crf"], weights["crf"] = sampled_crf(values, _imagenet_normalised(images), rows, cols), self.crf
        if self.total_variation:
            terms["total_variation"], weights["total_variation"] = total_variation(values), self.total_variation
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean squared error. The uncertainty is left out: it is no part of the upsampler that is chosen by it."""
        return reconstruction(prediction, target)

    def held_out_pairs(
        self, backbone: Backbone, images: Tensor, directions: Tensor, seed: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`Objective.held_out_pairs`."""
        normalised = backbone.normalise(images).permute(0, 2, 3, 1)
        upsampled = self._upsampled(self.features(backbone, normalised), images, directions, None)
        views = [
            self.jitter.sample(
                self.jitters, _size(images), seeded(seed, Purpose.HELD_OUT, Purpose.VIEWS, first + number)
            )
            for number in range(len(images))
        ]
        for prediction, target, _ in self._comparisons(backbone, normalised, upsampled, directions, views, None):
            yield prediction, target

    def _upsampled(self, coarse: Tensor, images: Tensor, directions: Tensor, dropout: torch.Generator | None) -> Tensor:
        """``[B, H, W, P]``; for an attention downsampler the logits follow as one more channel."""
        projection = ChannelMap.without_bias(directions)
        if isinstance(self.downsampler, AttentionDownsampler):
            logit = self.downsampler.logit_projection
            weight = logit.weight
            if dropout is not None:
                weight = self.downsampler.sample_logit_weight(self.downsampler.dropout.p, dropout)
            projection = ChannelMap(torch.cat([directions, weight]), torch.cat([projection.bias, logit.bias]))
        upsampled: Tensor = self.upsampler(coarse, images, _size(images), projection)
        return upsampled

    def _kept(self, grid: tuple[int, int], images: int, seed: int, step: int, first: int) -> Tensor | None:
        """Dropout of the cells' logits, ``[jitters, B, h, w]``; ``None`` where nothing is dropped."""
        down = self.downsampler
        if not (isinstance(down, AttentionDownsampler) and down.dropout.p and self.training):
            return None
        generators = (seeded(seed, Purpose.CELLS, step, first + place) for place in range(images))
        return torch.stack([down.sample_kept(down.dropout.p, one, self.jitters, *grid) for one in generators], 1)

    def _comparisons(
        self,
        backbone: Backbone,
        normalised: Tensor,
        upsampled: Tensor,
        directions: Tensor,
        views: Sequence[Sequence[View]],
        kept: Tensor | None,
    ) -> Iterator[_Comparison]:
        """Predicted features and target features, view by view; ``kept [jitters, B, h, w]`` of :meth:`_kept`."""
        grid = backbone.grid(_size(normalised))
        for number, batch_views in enumerate(zip(*views, strict=True)):
            warped = warp(upsampled, batch_views, self.jitter.max_pad)
            features = self.features(backbone, warp(normalised, batch_views, self.jitter.max_pad))
            count = len(directions)
            if isinstance(self.downsampler, AttentionDownsampler):
                cells = None if kept is None else kept[number].to(warped)
                prediction = self.downsampler(warped[..., :count], warped[..., count:], grid, cells)
            else:
                prediction = self.downsampler(warped, grid)
            yield _Comparison(prediction, features @ directions.T, features)


def _imagenet_normalised(images: Tensor) -> Tensor:
    """uint8 ``[B, H, W, 3]`` in the normalisation that the CRF's constants are for, whatever the backbone's own is."""
    return normalise_colours(as_guidance(images, torch.float32), IMAGENET_MEAN, IMAGENET_STD)


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[1], maps.shape[2]

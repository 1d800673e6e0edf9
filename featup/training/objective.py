"""The multi-view objective that trains upsamplers (FeatUp, sections 3.1 and 3.2).

Features are upsampled to the size of the image, warped by a jittered view, and downsampled by a learned model of the
backbone's patch. The result must match the backbone's features of that view. A projection of the channels commutes
with these steps (except with a JBU's same-resolution stages, which cost little), so a training step compares a few
random projections in place of all channels.

All random numbers follow from the seed, the step and an image's place in the batch of all workers. They depend neither
on the number of workers nor on where a run was interrupted. Only dropout uses torch's global generator.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.multiview.views import Jitter, View, warp
from featup.projection import orthonormal_directions
from featup.training.losses import (
    explained_variance,
    magnitude,
    reconstruction,
    sample_positions,
    sampled_crf,
    total_variation,
)
from featup.upsamplers import ChannelMap, Upsampler

__all__ = ["MultiViewObjective", "seeded"]


# The purposes of random numbers; each purpose has its own numbers from one seed.
_VIEWS, _DIRECTIONS, _ATTENTION, _CRF, _HELD_OUT = range(5)


def seeded(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded by whole numbers of at least 0; other keys give other numbers."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


class MultiViewObjective(nn.Module):
    """An upsampler, the downsampler that is trained with it, and their loss."""

    def __init__(
        self,
        upsampler: Upsampler,
        downsampler: AttentionDownsampler | BlurDownsampler,
        *,
        jitter: Jitter | None = None,
        jitters: int = 3,
        projections: int | None = 30,
        crf: float = 0.0,
        crf_positions: int = 1000,
        total_variation: float = 0.0,
        magnitude: float = 0.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            upsampler: Differentiable, from :func:`featup.upsamplers.create_trainable`.
            downsampler: With the backbone's stride; its kernel may be larger.
            jitter: The distribution of the views.
            jitters: Views of every image in a step, at least 1.
            projections: Random directions that are compared in a step, new ones in each, at least 1; ``None`` for all
                channels.
            crf, total_variation, magnitude: Weights of these terms; a term without weight is not computed.
            crf_positions: Number of positions of the sampled CRF.
            precision: Of the backbone's arithmetic. The upsampler computes in the type of its weights: its filters
                are differences of like numbers, for which half precision has too few digits.

        Raises:
            GeometryError: fewer than one view or projection.
        """
        super().__init__()
        if jitters < 1 or (projections is not None and projections < 1):
            raise GeometryError(f"objective: jitters={jitters} and projections={projections} must be at least 1")
        self.upsampler = upsampler
        self.downsampler = downsampler
        self.jitter = jitter or Jitter()
        self.jitters = jitters
        self.projections = projections
        self.crf = crf
        self.crf_positions = crf_positions
        self.total_variation = total_variation
        self.magnitude = magnitude
        self.precision = precision

    def forward(self, backbone: Backbone, images: Tensor, seed: int, step: int, first: int = 0) -> dict[str, Tensor]:
        """The loss of one step on this worker's share of the batch.

        Args:
            backbone: Frozen.
            images: uint8 ``[B, H, W, 3]``, with sides that fit the backbone's stride.
            seed, step: Of the random numbers.
            first: Place of the first image in the batch of all workers. If all shares have one size, the mean of the
                workers' losses is the loss of the batch.

        Returns:
            ``loss``, and the terms of this weighted sum, each a tensor without dimensions.

        Raises:
            GeometryError: images of a size that the backbone or the upsampler cannot serve.
        """
        directions = self._directions(backbone, seeded(seed, _DIRECTIONS, step)).to(images.device)
        # Sums over the projections are smaller by this factor than sums over all channels.
        share = len(directions) / backbone.channels
        normalised = backbone.normalise(images).permute(0, 2, 3, 1)
        coarse, dropout = self._features(backbone, normalised), seeded(seed, _ATTENTION, step)
        upsampled = self._upsampled(coarse, images, directions, dropout)
        values = upsampled[..., : len(directions)]
        views = [
            self.jitter.sample(self.jitters, _size(images), seeded(seed, _VIEWS, step, first + place))
            for place in range(len(images))
        ]
        terms = {"reconstruction": values.new_zeros(())}
        weights = {"reconstruction": 1.0}
        if self.magnitude:
            terms["magnitude"], weights["magnitude"] = values.new_zeros(()), self.magnitude
        for prediction, target in self._pairs(backbone, normalised, upsampled, directions, views):
            terms["reconstruction"] = terms["reconstruction"] + reconstruction(prediction, target) / self.jitters
            if self.magnitude:
                difference = magnitude(prediction, target) / share
                terms["magnitude"] = terms["magnitude"] + difference / self.jitters
        if self.crf:
            positions = sample_positions(_size(images), self.crf_positions, seeded(seed, _CRF, step))
            rows, cols = (axis.to(images.device) for axis in positions)
            terms["crf"] = sampled_crf(values, normalised, rows, cols) / share
            weights["crf"] = self.crf
        if self.total_variation:
            terms["total_variation"], weights["total_variation"] = total_variation(values), self.total_variation
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    @torch.no_grad()
    def evaluate(self, backbone: Backbone, batches: Iterable[Tensor], seed: int) -> float:
        """Explained variance on held-out images, in views and projections that are the same in every call.

        Args:
            backbone: Frozen.
            batches: The images in batches, uint8 ``[B, H, W, 3]``. The batch size does not change the random numbers.
            seed: Of the random numbers.

        Raises:
            GeometryError: images of a size that the backbone or the upsampler cannot serve.
        """
        training = self.training
        self.eval()
        pairs: list[tuple[Tensor, Tensor]] = []
        place = 0
        for images in batches:
            directions = self._directions(backbone, seeded(seed, _HELD_OUT, _DIRECTIONS)).to(images.device)
            normalised = backbone.normalise(images).permute(0, 2, 3, 1)
            upsampled = self._upsampled(self._features(backbone, normalised), images, directions, None)
            views = [
                self.jitter.sample(self.jitters, _size(images), seeded(seed, _HELD_OUT, _VIEWS, place + number))
                for number in range(len(images))
            ]
            pairs += self._pairs(backbone, normalised, upsampled, directions, views)
            place += len(images)
        self.train(training)
        return explained_variance(*(torch.cat(maps).double() for maps in zip(*pairs, strict=True))).item()

    def _directions(self, backbone: Backbone, generator: torch.Generator) -> Tensor:
        """The projection directions ``[P, C]``."""
        if self.projections is None:
            return torch.eye(backbone.channels)
        return orthonormal_directions(self.projections, backbone.channels, generator)

    @torch.no_grad()
    def _features(self, backbone: Backbone, normalised: Tensor) -> Tensor:
        """``[B, H, W, 3]``, normalised, to the coarse features ``[B, h, w, C]``."""
        with torch.autocast(normalised.device.type, self.precision, enabled=self.precision != torch.float32):
            features: Tensor = backbone.features(normalised.permute(0, 3, 1, 2))
        return features.float()

    def _upsampled(self, coarse: Tensor, images: Tensor, directions: Tensor, dropout: torch.Generator | None) -> Tensor:
        """``[B, H, W, P]``; for an attention downsampler the logits follow as one more channel."""
        projection = ChannelMap(directions, directions.new_zeros(len(directions)))
        if isinstance(self.downsampler, AttentionDownsampler):
            logit = self.downsampler.logit_projection
            weight = logit.weight
            if dropout is not None:
                # The same channels are dropped at all positions, or the logits would not be a projection.
                rate = self.downsampler.dropout.p
                mask = torch.rand(weight.shape, generator=dropout) >= rate
                weight = weight * mask.to(weight) / (1 - rate)
            projection = ChannelMap(torch.cat([directions, weight]), torch.cat([projection.bias, logit.bias]))
        upsampled: Tensor = self.upsampler(coarse, images, _size(images), projection)
        return upsampled

    def _pairs(
        self,
        backbone: Backbone,
        normalised: Tensor,
        upsampled: Tensor,
        directions: Tensor,
        views: Sequence[Sequence[View]],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted features and target features, view by view: ``[B, h, w, P]`` each."""
        grid = backbone.grid(_size(normalised))
        for batch_views in zip(*views, strict=True):
            warped = warp(upsampled, batch_views, self.jitter.max_pad)
            target = self._features(backbone, warp(normalised, batch_views, self.jitter.max_pad)) @ directions.T
            count = len(directions)
            if isinstance(self.downsampler, AttentionDownsampler):
                yield self.downsampler(warped[..., :count], warped[..., count:], grid), target
            else:
                yield self.downsampler(warped, grid), target


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[1], maps.shape[2]

"""The multi-view objective that upsamplers are trained by (FeatUp, sections 3.1 and 3.2).

Features are brought to the size of the image, seen in a jittered view, and downsampled by a learned model of the
backbone's patch; they must then be the features that the backbone gives for that view of the image. A projection of
the channels commutes with all of that (but for a JBU's stages at the features' own size, which cost little), so a step
compares a few random ones in place of all channels.

Whatever is drawn follows from the seed, the step and an image's place in the batch of all workers, so that it does not
matter how many workers share a batch, or where a run was interrupted. Dropout alone draws from torch's own generator.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.multiview.views import Jitter, View, warp
from featup.training.losses import (
    explained_variance,
    magnitude,
    reconstruction,
    sample_positions,
    sampled_crf,
    total_variation,
)
from featup.upsamplers import ChannelMap, Upsampler

__all__ = ["MultiViewObjective", "orthonormal_rows", "seeded"]


# What numbers are drawn for; one seed gives each purpose numbers of its own.
_VIEWS, _ROWS, _ATTENTION, _CRF, _HELD_OUT = range(5)


def seeded(*key: int) -> torch.Generator:
    """A generator on the CPU whose numbers follow from whole numbers of at least 0; other keys give other numbers."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def orthonormal_rows(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Random directions in the space of channels, uniform, of length 1, at right angles to each other.

    The mean square of a vector's entries is the expected mean square of its products with them: a loss that is a mean
    of squares is on average the same with them as with all channels.

    Args:
        count: How many; no more can be had than there are channels.
        channels: C of the features.
        generator: The only source of chance.

    Returns:
        ``[min(count, channels), channels]``.
    """
    # In double precision, so that other CPUs give the same numbers after rounding.
    drawn = torch.randn(channels, min(count, channels), generator=generator, dtype=torch.float64)
    columns, _ = torch.linalg.qr(drawn)
    rows: Tensor = columns.T.float()
    return rows.contiguous()


class MultiViewObjective(nn.Module):
    """An upsampler, the downsampler that is trained with it, and what the two are trained by."""

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
            upsampler: Differentiable, as :func:`featup.upsamplers.create_trainable` makes them.
            downsampler: With the backbone's stride, as kernel too unless its window is another one.
            jitter: The views that may be drawn.
            jitters: Views of every image in a step.
            projections: Random channels that are compared in a step, others in each; ``None`` for all channels.
            crf, total_variation, magnitude: Weights of these terms; a term without weight is not computed.
            crf_positions: Positions the CRF is sampled at.
            precision: Of the backbone's arithmetic. The upsampler's is the type of its weights: its filters are
                differences of like numbers, and half precision has no digits left for them.

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
            seed, step: Decide what is drawn.
            first: Place of the first image in the batch of all workers, whose shares are of one size: the mean of
                their losses is then that of the whole batch.

        Returns:
            ``loss``, and the terms it is the weighted sum of, each a tensor without dimensions.

        Raises:
            GeometryError: images of a size that the backbone or the upsampler cannot serve.
        """
        rows = self._rows(backbone, seeded(seed, _ROWS, step)).to(images.device)
        # The projected vectors are shorter; in this unit sums over channels are as with all of them.
        share = len(rows) / backbone.channels
        normalised = backbone.normalise(images).permute(0, 2, 3, 1)
        upsampled = self._upsampled(self._features(backbone, normalised), images, rows, seeded(seed, _ATTENTION, step))
        values = upsampled[..., : len(rows)]
        views = [
            self.jitter.sample(self.jitters, _size(images), seeded(seed, _VIEWS, step, first + place))
            for place in range(len(images))
        ]
        terms = {"reconstruction": values.new_zeros(())}
        weights = {"reconstruction": 1.0}
        if self.magnitude:
            terms["magnitude"], weights["magnitude"] = values.new_zeros(()), self.magnitude
        for prediction, target in self._pairs(backbone, normalised, upsampled, rows, views):
            terms["reconstruction"] = terms["reconstruction"] + reconstruction(prediction, target) / self.jitters
            if self.magnitude:
                difference = magnitude(prediction, target) / share
                terms["magnitude"] = terms["magnitude"] + difference / self.jitters
        if self.crf:
            at = sample_positions(_size(images), self.crf_positions, seeded(seed, _CRF, step))
            terms["crf"] = sampled_crf(values, normalised, *(one.to(images.device) for one in at)) / share
            weights["crf"] = self.crf
        if self.total_variation:
            terms["total_variation"], weights["total_variation"] = total_variation(values), self.total_variation
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    @torch.no_grad()
    def evaluate(self, backbone: Backbone, batches: Iterable[Tensor], seed: int) -> float:
        """The share of the variance that is explained on images held out, in views and projections that stay the same.

        Args:
            backbone: Frozen.
            batches: The images, some at a time, uint8 ``[B, H, W, 3]``. How they are grouped makes no difference to
                what is drawn.
            seed: Decides what is drawn.

        Raises:
            GeometryError: images of a size that the backbone or the upsampler cannot serve.
        """
        training = self.training
        self.eval()
        pairs: list[tuple[Tensor, Tensor]] = []
        place = 0
        for images in batches:
            rows = self._rows(backbone, seeded(seed, _HELD_OUT, _ROWS)).to(images.device)
            normalised = backbone.normalise(images).permute(0, 2, 3, 1)
            upsampled = self._upsampled(self._features(backbone, normalised), images, rows, None)
            views = [
                self.jitter.sample(self.jitters, _size(images), seeded(seed, _HELD_OUT, _VIEWS, place + number))
                for number in range(len(images))
            ]
            pairs += self._pairs(backbone, normalised, upsampled, rows, views)
            place += len(images)
        self.train(training)
        return explained_variance(*(torch.cat(maps).double() for maps in zip(*pairs, strict=True))).item()

    def _rows(self, backbone: Backbone, generator: torch.Generator) -> Tensor:
        """The directions compared: ``[P, C]``."""
        if self.projections is None:
            return torch.eye(backbone.channels)
        return orthonormal_rows(self.projections, backbone.channels, generator)

    @torch.no_grad()
    def _features(self, backbone: Backbone, normalised: Tensor) -> Tensor:
        """``[B, H, W, 3]``, normalised, to the coarse features ``[B, h, w, C]``."""
        with torch.autocast(normalised.device.type, self.precision, enabled=self.precision != torch.float32):
            features: Tensor = backbone.features(normalised.permute(0, 3, 1, 2))
        return features.float()

    def _upsampled(self, coarse: Tensor, images: Tensor, rows: Tensor, dropout: torch.Generator | None) -> Tensor:
        """``[B, H, W, P]``, and with an attention downsampler its logits as one channel more."""
        projection = ChannelMap(rows, rows.new_zeros(len(rows)))
        if isinstance(self.downsampler, AttentionDownsampler):
            logit = self.downsampler.logit_projection
            weight = logit.weight
            if dropout is not None:
                # What is left out of the logits is left out for all positions, or it would not be a projection.
                rate = self.downsampler.dropout.p
                kept = torch.rand(weight.shape, generator=dropout) >= rate
                weight = weight * kept.to(weight) / (1 - rate)
            projection = ChannelMap(torch.cat([rows, weight]), torch.cat([projection.bias, logit.bias]))
        upsampled: Tensor = self.upsampler(coarse, images, _size(images), projection)
        return upsampled

    def _pairs(
        self, backbone: Backbone, normalised: Tensor, upsampled: Tensor, rows: Tensor, views: Sequence[Sequence[View]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """View by view, what the features say the backbone gives and what it gives: ``[B, h, w, P]`` each."""
        grid = backbone.grid(_size(normalised))
        for shown in zip(*views, strict=True):
            seen = warp(upsampled, shown, self.jitter.max_pad)
            target = self._features(backbone, warp(normalised, shown, self.jitter.max_pad)) @ rows.T
            if isinstance(self.downsampler, AttentionDownsampler):
                yield self.downsampler(seen[..., : len(rows)], seen[..., len(rows) :], grid), target
            else:
                yield self.downsampler(seen, grid), target


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[1], maps.shape[2]

"""The base of the objectives that train upsamplers: random projections, random numbers, and the held-out error.

A projection of the channels commutes with upsampling, warping and downsampling. A training step therefore compares a
few random projections in place of all channels.

All random numbers follow from the seed, the step and an image's place in the batch of all workers. They depend neither
on the number of workers nor on where a run was interrupted. Only dropout uses torch's global generator.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.projection import orthonormal_directions
from featup.training.losses import explained_variance
from featup.upsamplers import Upsampler

__all__ = ["HeldOut", "Objective", "Purpose", "seeded"]


class Purpose(IntEnum):
    """The purposes of random numbers; each purpose has its own numbers from one seed."""

    VIEWS = 0
    DIRECTIONS = 1
    ATTENTION = 2
    CRF = 3
    HELD_OUT = 4
    CROPS = 5
    CELLS = 6


class HeldOut(NamedTuple):
    """How well held-out images are predicted.

    Attributes:
        loss: The error that training minimises, without regularisers and without the uncertainty.
        explained_variance: Of the same predictions, at most 1.
    """

    loss: float
    explained_variance: float


def seeded(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded by whole numbers of at least 0; other keys give other numbers."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


class Objective(nn.Module):
    """An upsampler and the loss that trains it; sub-classes say what is predicted.

    ``detail`` is the size of the images that it takes, in multiples of the size that the backbone is given.
    """

    detail = 1

    def __init__(self, upsampler: Upsampler, projections: int | None, precision: torch.dtype) -> None:
        """
        Args:
            upsampler: Differentiable, from :func:`featup.upsamplers.create_trainable`.
            projections: Random directions that are compared in a step, new ones in each, at least 1; ``None`` for all
                channels.
            precision: Of the backbone's arithmetic. The upsampler computes in the type of its weights: its filters
                are differences of like numbers, for which half precision has too few digits.

        Raises:
            GeometryError: no projection.
        """
        super().__init__()
        if projections is not None and projections < 1:
            raise GeometryError(f"objective: projections={projections} must be at least 1")
        self.upsampler = upsampler
        self.projections = projections
        self.precision = precision

    def forward(self, backbone: Backbone, images: Tensor, seed: int, step: int, first: int = 0) -> dict[str, Tensor]:
        """The loss of one step on this worker's share of the batch.

        Args:
            backbone: Frozen.
            images: uint8 ``[B, H, W, 3]``, with sides that are ``detail`` times such as fit the backbone's stride.
            seed, step: Of the random numbers.
            first: Place of the first image in the batch of all workers. If all shares have one size, the mean of the
                workers' losses is the loss of the batch.

        Returns:
            ``loss``, and its terms, each a tensor without dimensions.

        Raises:
            GeometryError: images of a size that the backbone or the upsampler cannot serve.
        """
        raise NotImplementedError

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The error of predicted features against target features, both ``[..., P]``, without dimensions."""
        raise NotImplementedError

    def held_out_pairs(
        self, backbone: Backbone, images: Tensor, directions: Tensor, seed: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted features and target features ``[B, h, w, P]`` of held-out images, the same in every call.

        Args:
            backbone, images, seed: See :meth:`evaluate`.
            directions: ``[P, C]``.
            first: Place of the first image among all held-out images.
        """
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, backbone: Backbone, batches: Iterable[Tensor], seed: int) -> HeldOut:
        """The error on held-out images, in views or crops and projections that are the same in every call.

        Args:
            backbone: Frozen.
            batches: The images in batches, as for :meth:`forward`. The batch size does not change the random numbers.
            seed: Of the random numbers.

        Raises:
            GeometryError: images of a size that the backbone or the upsampler cannot serve.
        """
        training = self.training
        self.eval()
        pairs: list[tuple[Tensor, Tensor]] = []
        place = 0
        for images in batches:
            directions = self.directions(backbone, seeded(seed, Purpose.HELD_OUT, Purpose.DIRECTIONS)).to(images.device)
            pairs += self.held_out_pairs(backbone, images, directions, seed, place)
            place += len(images)
        self.train(training)
        prediction, target = (torch.cat(maps).double() for maps in zip(*pairs, strict=True))
        return HeldOut(self.error(prediction, target).item(), explained_variance(prediction, target).item())

    def directions(self, backbone: Backbone, generator: torch.Generator) -> Tensor:
        """The projection directions ``[P, C]``."""
        if self.projections is None:
            return torch.eye(backbone.channels)
        return orthonormal_directions(self.projections, backbone.channels, generator)

    @torch.no_grad()
    def features(self, backbone: Backbone, normalised: Tensor) -> Tensor:
        """``[B, H, W, 3]``, normalised, to the coarse features ``[B, h, w, C]``."""
        with torch.autocast(normalised.device.type, self.precision, enabled=self.precision != torch.float32):
            features: Tensor = backbone.features(normalised.permute(0, 3, 1, 2))
        return features.float()

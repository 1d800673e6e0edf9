"""Projections of features: the PCA of a data set, in whose space its images share a basis, and random directions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.upsamplers.base import ChannelMap

__all__ = ["PCA", "PCAFit", "orthonormal_directions"]


@dataclass(frozen=True, eq=False)
class PCA:
    """A linear projection from ``C`` to ``K`` channels.

    Attributes:
        components: float32 ``[K, C]``: orthonormal projection directions, most variance first.
        mean: float32 ``[C]``, of the data.
        variance: float32 ``[K]``, of the data along each component.
        explained_variance_ratio: Variance along the ``K`` components over the total variance, 0 to 1.
        count: Number of vectors it was fitted on.
    """

    components: Tensor
    mean: Tensor
    variance: Tensor
    explained_variance_ratio: float
    count: int

    def as_channel_map(self) -> ChannelMap:
        """:meth:`project` as a channel map, the form that upsamplers take."""
        return ChannelMap(self.components, -(self.components @ self.mean))

    def project(self, features: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., K]``."""
        return (features - self.mean.to(features)) @ self.components.T.to(features)


class PCAFit:
    """Accumulates mean and covariance in float64: an exact fit whose memory does not depend on the amount of data."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._square = torch.zeros(channels, channels, dtype=torch.float64)
        self._shift: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Add vectors ``[..., C]``; vectors that are not finite are left out.

        Raises:
            GeometryError: vectors of another number of channels.
        """
        if features.shape[-1] != len(self._sum):
            raise GeometryError(
                f"PCA: fitted on {len(self._sum)} channels, got vectors of {features.shape[-1]} in "
                f"{tuple(features.shape)}; features are channels-last and one fit takes one backbone and layer"
            )
        vectors = features.reshape(-1, features.shape[-1]).detach().cpu().double()
        vectors = vectors[vectors.isfinite().all(1)]
        if not len(vectors):
            return
        # Sums about a point near the mean keep their digits where the mean is large against the spread.
        if self._shift is None:
            self._shift = vectors.mean(0)
        vectors = vectors - self._shift
        self.count += len(vectors)
        self._sum += vectors.sum(0)
        self._square += vectors.T @ vectors

    def solve(self, components: int) -> PCA:
        """The ``components`` directions of most variance. The largest entry of each is positive, which fixes its sign.

        Raises:
            GeometryError: more components than channels, or than vectors were added less one.
        """
        channels = len(self._sum)
        if not 1 <= components <= min(channels, max(self.count - 1, 0)):
            raise GeometryError(
                f"PCA: {components} components of {channels} channels from {self.count} vectors; "
                "ask for at most the number of channels, and fit on more images if the vectors are too few"
            )
        assert self._shift is not None
        mean = self._sum / self.count
        covariance = self._square / self.count - torch.outer(mean, mean)
        variance, vectors = torch.linalg.eigh(covariance)
        order = variance.argsort(descending=True)[:components]
        basis = vectors[:, order].T
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        basis = basis * torch.where(largest < 0, -1.0, 1.0)
        along = variance[order].clamp_min(0)
        total = float(variance.clamp_min(0).sum())
        return PCA(
            components=basis.float().contiguous(),
            mean=(mean + self._shift).float(),
            variance=along.float(),
            explained_variance_ratio=float(along.sum()) / total if total else 1.0,
            count=self.count,
        )


def orthonormal_directions(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Sample orthonormal projection directions in the space of channels, uniformly.

    The expected mean square of a vector's products with them equals the mean square of the vector's entries. A loss
    that is a mean of squares has the same expectation on the projections as on all channels.

    Args:
        count: Number of directions; at most ``channels`` are returned.
        channels: C of the features.
        generator: The only source of chance.

    Returns:
        ``[min(count, channels), channels]``.
    """
    # In double precision, so that other CPUs give the same numbers after rounding.
    gaussian = torch.randn(channels, min(count, channels), generator=generator, dtype=torch.float64)
    columns, _ = torch.linalg.qr(gaussian)
    directions: Tensor = columns.T.float()
    return directions.contiguous()

"""PCA of features: one basis for a whole data set, so that the features of different images live in one space."""

from dataclasses import dataclass

import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.upsamplers.base import ChannelMap

__all__ = ["PCA", "PCAFit"]


@dataclass(frozen=True, eq=False)
class PCA:
    """A linear projection from ``C`` to ``K`` channels.

    ``components`` float32 ``[K, C]`` with orthonormal rows, most variance first; ``mean`` float32 ``[C]``;
    ``variance`` float32 ``[K]``, of the data along each component; ``explained`` the fraction of the data's variance
    that the ``K`` components hold; ``count`` the number of vectors it was fitted on.
    """

    components: Tensor
    mean: Tensor
    variance: Tensor
    explained: float
    count: int

    def as_channel_map(self) -> ChannelMap:
        """``project`` as a channel map, to hand to an upsampler."""
        return ChannelMap(self.components, -(self.components @ self.mean))

    def project(self, features: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., K]``."""
        return (features - self.mean.to(features)) @ self.components.T.to(features)

    def unproject(self, projected: Tensor) -> Tensor:
        """``[..., K]`` back to ``[..., C]``, without what the projection dropped."""
        return projected @ self.components.to(projected) + self.mean.to(projected)


class PCAFit:
    """Accumulates mean and covariance in float64, so that the fit is exact and its memory independent of the data."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._square = torch.zeros(channels, channels, dtype=torch.float64)
        self._shift: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Take in vectors ``[..., C]``; those that are not finite are left out.

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
        """The ``components`` directions of most variance. Each one's largest entry is positive, which fixes its sign.

        Raises:
            GeometryError: more components asked for than there are channels, or than vectors were taken in.
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
        kept = variance[order].clamp_min(0)
        total = float(variance.clamp_min(0).sum())
        return PCA(
            components=basis.float().contiguous(),
            mean=(mean + self._shift).float(),
            variance=kept.float(),
            explained=float(kept.sum()) / total if total else 1.0,
            count=self.count,
        )

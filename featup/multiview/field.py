"""Feature fields: one image's features as a function of resolution, and upsamplers that make one for each image."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.images import resize_images
from featup.upsamplers.base import ChannelMap, Upsampler

__all__ = ["FeatureField", "PerImageUpsampler"]


@dataclass(frozen=True, eq=False)
class FeatureField(ABC):
    """One image's features at any resolution.

    Attributes:
        explained_variance: Of held-out views' features, 1 at best; ``None`` where it was not measured.
        baseline_explained_variance: The same of bilinear interpolation.
    """

    explained_variance: float | None
    baseline_explained_variance: float | None

    @abstractmethod
    def query(self, size: tuple[int, int], projection: ChannelMap | None = None, out: Tensor | None = None) -> Tensor:
        """Evaluate the features.

        Args:
            size: (height, width) of the map.
            projection: From the backbone's channels to ``K``; by default none.
            out: ``[height, width, K]`` to write into.

        Returns:
            ``[height, width, K]``, or ``C`` channels without a projection.
        """


class PerImageUpsampler(Upsampler):
    """An upsampler that computes the backbone's features of many views of each image.

    Images are treated one after another, with random numbers of their own: the result for an image does not depend on
    its batch mates.
    """

    def __init__(self, backbone: Backbone) -> None:
        """
        Args:
            backbone: Of the features; it computes the features of the views.
        """
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        size: tuple[int, int],
        projection: ChannelMap | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Upsampler.forward`. The guidance is the uint8 image that the features come from, at the
        backbone's size or larger."""
        if out is None:
            out = features.new_empty(
                len(features), *size, features.shape[-1] if projection is None else len(projection.bias)
            )
        for image_out, field in zip(out, self.fields(features, guidance), strict=True):
            field.query(size, projection, image_out)
        return out

    def fields(self, features: Tensor, guidance: Tensor) -> list[FeatureField]:
        """The feature fields of images.

        Args:
            features: Their coarse features ``[B, h, w, C]``.
            guidance: The images, uint8 ``[B, H, W, 3]``, at the size that the features come from or larger.

        Raises:
            GeometryError: images that are not uint8, or whose features are of another batch or backbone.
        """
        if (
            guidance.dtype != torch.uint8
            or features.dim() != 4
            or len(features) != len(guidance)
            or features.shape[-1] != self.backbone.channels
        ):
            raise GeometryError(
                f"{self.name}: need uint8 images [B, H, W, 3] and their features [B, h, w, {self.backbone.channels}], "
                f"got {guidance.dtype} {tuple(guidance.shape)} and {tuple(features.shape)}; views of the images go "
                "through the backbone again"
            )
        stride = self.backbone.stride
        size = (features.shape[1] * stride[0], features.shape[2] * stride[1])
        self.backbone.grid(size)  # Raises for sizes that the backbone cannot take.
        images = resize_images(guidance, size)
        return [
            self.field(features[number][None], images[number][None], guidance[number][None])
            for number in range(len(images))
        ]

    def field(self, features: Tensor, image: Tensor, guidance: Tensor) -> FeatureField:
        """The feature field of one image.

        Args:
            features: ``[1, h, w, C]``.
            image: uint8 ``[1, H, W, 3]``, at the size that the backbone takes.
            guidance: The same image as it was given.
        """
        raise NotImplementedError

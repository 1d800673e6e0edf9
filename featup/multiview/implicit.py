"""The implicit upsampler: a small network fitted to each image from jittered views of it (FeatUp, section 3.3).

The network maps a position and its colour to a feature. Its output is added to the map of a feed-forward upsampler.
The map is fitted until the means of its features over the patches of a view's tokens match the backbone's features of
that view. A step samples tokens of all views and a few positions in each patch, as a NeRF samples rays: its cost does
not depend on the size of the image or of the patch, nor on the number of views.

The feed-forward upsampler takes the multi-view average of the features, which removes the backbone's noise from patch
to patch. The network works in the space of a PCA of the whole data set, so that the features of different images can
train one probe.

Images are fitted side by side, each with its own weights, views and samples, sampled by its own generator: the result
for an image does not depend on its batch mates.
"""

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.multiview.fit import Fit
from featup.multiview.fitting import fit_images
from featup.multiview.options import FitOptions
from featup.projection import PCA
from featup.upsamplers.base import ChannelMap, Upsampler

__all__ = ["Fit", "FitOptions", "Implicit"]


class Implicit(Upsampler):
    """Fits a network to each image and returns the fitted features; see the module.

    After a call, :attr:`fits` holds the fits of its images.
    """

    name = "implicit"

    def __init__(
        self,
        backbone: Backbone,
        pca: PCA,
        base: Upsampler,
        options: FitOptions | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            backbone: Of the features; it computes the features of the views.
            pca: Of the data set: the space of the network's output.
            base: The feed-forward upsampler of the initial map.
            options: See :class:`FitOptions`.
            size: (height, width) of the images that the backbone takes; by default that of the guidance.
        """
        super().__init__()
        self.size = size
        self.backbone = backbone
        self.pca = pca
        self.options = options or FitOptions()
        self.base = base
        self.fits: list[Fit] = []

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
        self.fits = self.fit(features, guidance)
        channels = features.shape[-1]
        if projection is None:
            projection = ChannelMap(torch.eye(channels).to(features), features.new_zeros(channels))
        if out is None:
            out = features.new_empty(len(features), *size, len(projection.bias))
        for image_out, fit in zip(out, self.fits, strict=True):
            fit.query(size, projection=projection, out=image_out)
        return out

    def fit(self, features: Tensor, guidance: Tensor) -> list[Fit]:
        """Fit images.

        Args:
            features: Their coarse features ``[B, h, w, C]``.
            guidance: The images, uint8 ``[B, H, W, 3]``, at the size that the features come from or larger.

        Returns:
            A fit for each image.

        Raises:
            GeometryError: images that are not uint8, or whose features have another grid.
        """
        size = self.size or (guidance.shape[1], guidance.shape[2])
        grid = self.backbone.grid(size)
        if guidance.dtype != torch.uint8 or tuple(features.shape[1:3]) != grid or len(features) != len(guidance):
            raise GeometryError(
                f"implicit: need uint8 images [B, H, W, 3] and their features [B, {grid[0]}, {grid[1]}, C], got "
                f"{guidance.dtype} {tuple(guidance.shape)} and {tuple(features.shape)}; views are computed at "
                f"{size} (height, width), the size that the backbone takes"
            )
        # On a CPU a stack of networks saves no time, and matrix products round by the shape of the stack.
        group = len(guidance) if guidance.device.type == "cuda" else 1
        fits: list[Fit] = []
        with torch.inference_mode(False), torch.enable_grad():
            for start in range(0, len(guidance), max(1, group)):
                part = slice(start, start + group)
                # The copies are no inference tensors, with which autograd could not fit.
                fits += fit_images(
                    self.backbone,
                    self.pca,
                    self.base,
                    self.options,
                    features[part].clone(),
                    guidance[part].clone(),
                    size,
                )
        return fits

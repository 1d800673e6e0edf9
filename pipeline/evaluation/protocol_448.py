"""The field's protocol for one method: probes trained on its upsampled features of mirrored images, made on the fly.

The backbone is frozen, and the only augmentation has two outcomes. The coarse features of every image and of its mirror
image are therefore computed once for all methods and epochs; only the upsampling is repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featup.evaluation.pixel_probe import PixelProbeRecipe, Sample, train_pixel_probe
from featup.upsamplers import ChannelMap
from pipeline.compute.device import choose_device
from pipeline.evaluation.image_set import ImageSet
from pipeline.evaluation.methods import FeedForwardMethod, Method
from pipeline.training.tasks import Task

__all__ = ["Protocol448"]


@dataclass(frozen=True, eq=False)
class Protocol448:
    """What the protocol trains on.

    Attributes:
        task: Segmentation.
        images, mirrored: The training images, and the same images mirrored.
        recipe: Of the training.
    """

    task: Task
    images: ImageSet
    mirrored: ImageSet
    recipe: PixelProbeRecipe

    @property
    def upsamplings(self) -> int:
        """Images that the training of one probe upsamples."""
        return self.recipe.epochs * len(self.images)

    def train(self, method: Method, seed: int, report: Callable[[int, float], None], moved: bool = True) -> ChannelMap:
        """Train a probe on a method's upsampled features.

        Args:
            method: Not fitted to every image.
            seed: Of the training.
            report: See :func:`featup.evaluation.pixel_probe.train_pixel_probe`.
            moved: Whether the probe is moved through the method, where its result is differentiable in the probe. The
                method then applies the probe where that is cheapest: before it upsamples, where it is linear, or as a
                part of the channel map that it ends in. ``False``: all channels are upsampled first.
        """
        commutes = moved and isinstance(method, FeedForwardMethod) and not method.per_image

        def logits(sample: Sample, probe: ChannelMap) -> Tensor:
            images = self._set(sample)
            image = slice(sample.image, sample.image + 1)
            if commutes:
                return images.upsample(method, image, probe)[0]
            with torch.no_grad():
                features = images.upsample(method, image, None)[0]
            return functional.linear(features, probe.weight, probe.bias)

        return train_pixel_probe(
            logits,
            lambda sample: self._set(sample).labels[sample.image],
            images=len(self.images),
            channels=self.images.features.shape[-1],
            classes=self.task.channels,
            recipe=self.recipe,
            seed=seed,
            device=choose_device(None),
            report=report,
        )

    def _set(self, sample: Sample) -> ImageSet:
        return self.mirrored if sample.mirrored else self.images

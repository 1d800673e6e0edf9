"""The field's protocol: a linear probe trained by gradient descent on all pixels of upsampled features.

The recipe is that of JAFAR's tables (arXiv 2506.11136) and of those since: one 1x1 convolution with bias, AdamW, two
images a step, mirrored at random, and a cosine of the learning rate over all steps.

A 1x1 convolution commutes with an upsampler that is linear over space. A probe can therefore be moved through it: the
logits of the coarse features are upsampled, K channels in place of C, with the same losses and gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.upsamplers.base import ChannelMap

__all__ = ["PixelProbeRecipe", "Sample", "train_pixel_probe"]


@dataclass(frozen=True)
class PixelProbeRecipe:
    """How a probe is trained.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images of a step; the last step of an epoch has the rest.
        learning_rate: At the first step; it falls to zero along half a cosine over all steps.
        betas, weight_decay: Of AdamW.
        flip: Probability that an image is mirrored.
    """

    epochs: int = 20
    batch_size: int = 2
    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-5
    flip: float = 0.5


@dataclass(frozen=True)
class Sample:
    """One image of a training step: its number, and whether it is mirrored."""

    image: int
    mirrored: bool


def train_pixel_probe(
    logits: Callable[[Sample, ChannelMap], Tensor],
    labels: Callable[[Sample], Tensor],
    images: int,
    channels: int,
    classes: int,
    recipe: PixelProbeRecipe,
    seed: int = 0,
    device: torch.device | None = None,
    report: Callable[[int, float], None] = lambda images, loss: None,
) -> ChannelMap:
    """Train a segmentation probe on all labelled pixels of a set of images.

    Args:
        logits: A probe's output for an image, ``[H, W, K]``, differentiable in the probe.
        labels: Class ids ``[H, W]``; pixels outside 0 to ``classes - 1`` have no class.
        images: N.
        channels: C of the features.
        classes: K.
        recipe: Of the training.
        seed: Of the initial weights, the order of the images and the mirrored ones.
        device: Of the probe's weights.
        report: Called after each step with the images that it took, and its loss.

    Raises:
        GeometryError: no pixel with a class in all of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    # As torch initialises a 1x1 convolution.
    bound = 1 / sqrt(channels)
    weight, bias = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device).requires_grad_()
        for shape in ((classes, channels), (classes,))
    )
    optimiser = torch.optim.AdamW(
        [weight, bias], recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * ceil(images / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    pixels = 0
    with torch.enable_grad():
        for batch in _batches(images, recipe, generator):
            probe = ChannelMap(weight, bias)
            targets = [_targets(labels(sample), classes) for sample in batch]
            known = sum(int((target >= 0).sum()) for target in targets)
            optimiser.zero_grad()
            loss = 0.0
            # Image by image: gradients add up, and the map of one image is held at a time.
            for sample, target in zip(batch, targets, strict=True):
                output = logits(sample, probe).flatten(0, 1)
                ids = target.flatten().to(output.device)
                part = functional.cross_entropy(output, ids, ignore_index=-1, reduction="sum")
                part = part / max(1, known)
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
            optimiser.step()
            schedule.step()
            pixels += known
            report(len(batch), loss)
    if not pixels:
        raise GeometryError(
            f"probe: none of {images} images has a pixel with one of {classes} classes. Likely cause: labels of "
            "another set of classes, or the wrong id for pixels without one"
        )
    return ChannelMap(weight.detach(), bias.detach())


def _batches(images: int, recipe: PixelProbeRecipe, generator: torch.Generator) -> Iterator[list[Sample]]:
    """The samples of each step: every epoch has each image once, in a new order."""
    for _ in range(recipe.epochs):
        order = torch.randperm(images, generator=generator).tolist()
        mirrored = (torch.rand(images, generator=generator) < recipe.flip).tolist()
        samples = [Sample(image, flip) for image, flip in zip(order, mirrored, strict=True)]
        yield from (samples[start : start + recipe.batch_size] for start in range(0, images, recipe.batch_size))


def _targets(labels: Tensor, classes: int) -> Tensor:
    """Class ids as int64, and -1 where there is none."""
    ids = labels.long()
    return torch.where((ids >= 0) & (ids < classes), ids, -1)

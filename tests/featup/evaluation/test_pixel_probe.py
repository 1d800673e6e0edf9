"""The field's probe training, against torch's own modules, and moved through upsamplers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.evaluation.pixel_probe import PixelProbeRecipe, Sample, train_pixel_probe
from featup.upsamplers import AnyUp, ChannelMap, Upsampler, create_upsampler
from tests.featup.support import CHANNELS, picture, random, relative_error
from tests.featup.upsamplers.support import learned, random_jbu, randomised

CLASSES, IMAGES, SIZE = 4, 5, (12, 15)
RECIPE = PixelProbeRecipe(epochs=3, learning_rate=0.05)


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[N, 3, 4, C]``, images and labels, whose last class is none."""
    features = random(IMAGES, 3, 4, CHANNELS)
    labels = torch.randint(0, CLASSES + 1, (IMAGES, *SIZE), generator=torch.Generator().manual_seed(5))
    return features, picture(IMAGES, *SIZE, 3), torch.where(labels == CLASSES, -1, labels)


def train(
    upsampler: Upsampler, moved: bool, seed: int = 0, recipe: PixelProbeRecipe = RECIPE
) -> tuple[ChannelMap, list[float]]:
    """The probe and the losses of its steps; a mirrored image has other features."""
    features, images, labels = scene()
    losses = []

    def logits(sample: Sample, probe: ChannelMap) -> Tensor:
        number = slice(sample.image, sample.image + 1)
        low = -features[number] if sample.mirrored else features[number]
        if moved:
            return upsampler(low, images[number], SIZE, probe)[0]
        with torch.no_grad():
            whole = upsampler(low, images[number], SIZE)[0]
        return functional.linear(whole, probe.weight, probe.bias)

    def report(count: int, loss: float) -> None:
        assert count in (1, 2)
        losses.append(loss)

    probe = train_pixel_probe(
        logits, lambda sample: labels[sample.image], IMAGES, CHANNELS, CLASSES, recipe, seed, report=report
    )
    return probe, losses


UPSAMPLERS = {name: create_upsampler(name, channels=CHANNELS) for name in ("bilinear", "bilateral", "guided_filter")}  # type: ignore[arg-type]
UPSAMPLERS |= {
    "norm_bilinear": create_upsampler("norm_bilinear", channels=CHANNELS),
    "jbu": random_jbu().requires_grad_(False),
    "anyup": randomised(AnyUp(16)).eval().requires_grad_(False),
    **{name: learned(name) for name in ("resize_conv", "carafe", "ifa")},
}


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_a_moved_probe_is_the_plain_probe(name: str) -> None:
    """The same losses and weights after nine steps, for an upsampler that ends in a channel map too."""
    moved, moved_losses = train(UPSAMPLERS[name], moved=True)
    plain, plain_losses = train(UPSAMPLERS[name], moved=False)
    assert len(plain_losses) == RECIPE.epochs * 3
    assert moved_losses == pytest.approx(plain_losses, rel=1e-5)
    assert relative_error(moved.weight, plain.weight) <= 1e-5
    assert relative_error(moved.bias, plain.bias) <= 1e-5


def test_it_is_a_convolution_with_adamw_and_a_cosine_over_all_steps() -> None:
    """The images of a step as one batch, by torch's modules; every epoch has each image once."""
    features, images, labels = scene()
    bilinear = UPSAMPLERS["bilinear"]
    order: list[Sample] = []

    def logits(sample: Sample, probe: ChannelMap) -> Tensor:
        order.append(sample)
        number = slice(sample.image, sample.image + 1)
        return bilinear(features[number], images[number], SIZE, probe)[0]

    recipe = PixelProbeRecipe(epochs=4)
    arguments = (logits, lambda sample: labels[sample.image], IMAGES, CHANNELS, CLASSES)
    start = train_pixel_probe(*arguments, PixelProbeRecipe(epochs=1, learning_rate=0.0))
    order.clear()
    found = train_pixel_probe(*arguments, recipe)
    assert all(sorted(one.image for one in order[at : at + 5]) == list(range(5)) for at in range(0, 20, 5))
    assert {sample.mirrored for sample in order} == {False, True}
    convolution = torch.nn.Conv2d(CHANNELS, CLASSES, 1)
    convolution.weight.data, convolution.bias.data = start.weight[..., None, None].clone(), start.bias.clone()
    optimiser = torch.optim.AdamW(convolution.parameters(), 5e-4, betas=(0.9, 0.999), weight_decay=1e-5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=4 * 3)
    for epoch in range(4):
        for at in (0, 2, 4):
            batch = [sample.image for sample in order[5 * epoch + at : 5 * epoch + min(at + 2, 5)]]
            optimiser.zero_grad()
            maps = bilinear(features[batch], images[batch], SIZE).permute(0, 3, 1, 2)
            functional.cross_entropy(convolution(maps), labels[batch], ignore_index=-1).backward()
            optimiser.step()
            cosine.step()
    assert relative_error(found.weight - start.weight, convolution.weight[..., 0, 0].detach() - start.weight) <= 1e-3
    assert relative_error(found.bias - start.bias, convolution.bias.detach() - start.bias) <= 1e-3


def test_the_seed_is_the_only_source_of_chance() -> None:
    (first, losses), (again, same) = (train(UPSAMPLERS["bilinear"], True, seed=1) for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    assert losses == same
    assert not torch.equal(first.weight, train(UPSAMPLERS["bilinear"], True, seed=2)[0].weight)


def test_it_learns() -> None:
    _, losses = train(UPSAMPLERS["bilinear"], True, recipe=PixelProbeRecipe(40, learning_rate=0.1, flip=0))
    assert sum(losses[-3:]) < sum(losses[:3])


def test_labels_of_no_class_are_refused() -> None:
    with pytest.raises(GeometryError, match="none of 2 images has a pixel with one of 3 classes"):
        train_pixel_probe(
            lambda sample, probe: torch.zeros(2, 2, 3) + probe.bias,
            lambda sample: torch.full((2, 2), 7),
            *(2, 5, 3, RECIPE),
        )

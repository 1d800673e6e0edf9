"""One linear operator over space for all channels: values other than the features, by the features' operator."""

from collections.abc import Callable

import pytest
import torch

from featup.errors import GeometryError
from featup.upsamplers import AnyUp, Bilateral, ChannelMap, GuidedFilter, NormBilinear, Upsampler, create_upsampler
from tests.featup.support import CHANNELS, TOLERANCE, picture, random, relative_error
from tests.featup.upsamplers.support import learned, random_jbu, randomised

UPSAMPLERS: dict[str, Callable[[], Upsampler]] = {
    name: (lambda name=name: create_upsampler(name, channels=CHANNELS))  # type: ignore[misc]
    for name in ("nearest", "bilinear", "bicubic", "guided_filter")
}
UPSAMPLERS |= {
    "bilateral": lambda: Bilateral(same_resolution_stages=0),
    "carafe": lambda: learned("carafe"),
    "sapa": lambda: learned("sapa"),
    "anyup": lambda: randomised(AnyUp(16)).eval().requires_grad_(False),
}


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_mapped_features_are_upsampled_like_the_features(name: str) -> None:
    """The values that a channel map makes of the features: then operator and map commute."""
    features, image = random(2, 4, 5, CHANNELS), picture(2, 26, 31, 3)
    upsampler = UPSAMPLERS[name]()
    assert upsampler.has_operator
    weight = random(3, CHANNELS)
    found = upsampler.apply_operator(features, features @ weight.T, image, (26, 31))
    expected = upsampler(features, image, (26, 31), ChannelMap(weight, torch.zeros(3)))
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_probabilities_stay_probabilities(name: str) -> None:
    """The weights of every position sum to one."""
    features, image = random(1, 4, 5, CHANNELS), picture(1, 26, 31, 3)
    found = UPSAMPLERS[name]().apply_operator(features, random(1, 4, 5, 7).softmax(-1), image, (26, 31)).sum(-1)
    assert relative_error(found, torch.ones(1, 26, 31)) <= TOLERANCE


def test_the_channel_map_at_the_end_is_for_features_alone() -> None:
    jbu, features, image = random_jbu().requires_grad_(False), random(1, 4, 5, CHANNELS), picture(1, 26, 31, 3)
    values = jbu.apply_operator(features, torch.ones(1, 4, 5, 2), image, (26, 31))
    end = jbu.output_projection(CHANNELS)
    upsampled = jbu.apply_operator(features, features, image, (26, 31)) @ end.weight.T
    upsampled += end.bias
    assert relative_error(upsampled, jbu(features, image, (26, 31))) <= TOLERANCE
    assert values.shape == (1, 26, 31, 2)


@pytest.mark.parametrize(
    "upsampler", [NormBilinear(), learned("resize_conv"), learned("ifa")], ids=lambda one: one.name
)
def test_upsamplers_without_one_operator(upsampler: Upsampler) -> None:
    assert not upsampler.has_operator
    with pytest.raises(GeometryError, match=f"{upsampler.name} is not one linear operator"):
        upsampler.apply_operator(random(1, 4, 5, CHANNELS), random(1, 4, 5, 2), picture(1, 26, 31, 3), (26, 31))


def test_values_of_another_grid() -> None:
    with pytest.raises(GeometryError, match=r"guided_filter: values \[1, 5, 4, 2\] must lie on the grid"):
        GuidedFilter().apply_operator(random(1, 4, 5, CHANNELS), random(1, 5, 4, 2), picture(1, 26, 31, 3), (26, 31))


def test_means_of_a_same_resolution_stage_do_not_rescale_other_values() -> None:
    """Probabilities stay those: only features are rescaled to their norms."""
    features, image = random(1, 4, 5, CHANNELS), picture(1, 26, 31, 3)
    found = Bilateral().apply_operator(features, random(1, 4, 5, 7).softmax(-1), image, (26, 31)).sum(-1)
    assert relative_error(found, torch.ones(1, 26, 31)) <= TOLERANCE
    rescaled = Bilateral()(features, image, (26, 31))
    assert relative_error(Bilateral().apply_operator(features, features, image, (26, 31)), rescaled) > 0.01

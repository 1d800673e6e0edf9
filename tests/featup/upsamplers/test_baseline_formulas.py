"""The trained baselines, each against its formula written a second way."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.upsamplers import (
    CARAFE,
    Interpolate,
)
from tests.featup.support import CHANNELS, TOLERANCE, picture, random, relative_error
from tests.featup.upsamplers.support import LEARNED, learned

reassembly = pytest.mark.parametrize("name", ["carafe", "sapa"])
starts_bilinear = pytest.mark.parametrize("name", ["resize_conv", "ifa"])


@starts_bilinear
@pytest.mark.parametrize(("low", "size"), [((4, 5), (16, 20)), ((5, 7), (31, 45))], ids=["factor2", "odd"])
def test_untrained_is_bilinear(name: str, low: tuple[int, int], size: tuple[int, int]) -> None:
    features, image = random(2, *low, CHANNELS), picture(2, *size, 3)
    result = LEARNED[name](CHANNELS)(features, image, size)
    assert torch.equal(result, Interpolate("bilinear")(features, image, size))


@reassembly
@pytest.mark.parametrize("size", [(16, 20), (27, 31), (5, 5)], ids=str)
def test_kernels_sum_to_one(name: str, size: tuple[int, int]) -> None:
    constant = random(1, 1, 1, CHANNELS)
    result = learned(name)(constant.expand(1, 4, 5, CHANNELS), picture(1, *size, 3), size)
    assert relative_error(result, constant.expand(1, *size, CHANNELS)) <= TOLERANCE


@reassembly
def test_results_are_within_the_range_of_the_features(name: str) -> None:
    features = random(1, 4, 5, CHANNELS)
    result = learned(name)(features, picture(1, 27, 31, 3), (27, 31))
    assert result.max() <= features.max() + TOLERANCE
    assert result.min() >= features.min() - TOLERANCE


def test_untrained_carafe_keeps_a_ramp() -> None:
    """Its Gaussians lie about the children's places, up and down, left and right."""
    ramp = torch.stack(torch.meshgrid(torch.arange(10.0), -torch.arange(12.0), indexing="ij"), -1)[None]
    torch.manual_seed(0)
    result = CARAFE(2).requires_grad_(False)(ramp, picture(1, 20, 24, 3), (20, 24))
    exact = Interpolate("bilinear")(ramp, picture(1, 20, 24, 3), (20, 24))
    within = (slice(None), slice(4, -4), slice(4, -4))
    assert float((result - exact)[within].abs().max()) <= 0.1


def _edges(x: Tensor, by: int) -> Tensor:
    return functional.pad(x, (by, by, by, by), mode="replicate")


def test_carafe_is_its_formula() -> None:
    """As in the paper: pixel shuffle of the encoder's channels, softmax, the parent's unfolded window."""
    upsampler = learned("carafe").double()
    features, h, w = random(1, 3, 4, CHANNELS).double(), 3, 4
    compressed = upsampler.compress(features).permute(0, 3, 1, 2)
    encode = upsampler.stages[0].encode
    logits = functional.conv2d(_edges(compressed, 1), encode.weight, encode.bias)
    by_tap = logits.view(1, 2, 2, 25, h, w).permute(0, 3, 1, 2, 4, 5).reshape(1, 25 * 4, h, w)
    kernels = functional.pixel_shuffle(by_tap, 2).softmax(1)
    windows = functional.unfold(_edges(features.permute(0, 3, 1, 2), 2), 5).view(1, CHANNELS, 25, h, w)
    parents = windows.repeat_interleave(2, 3).repeat_interleave(2, 4)
    expected = (parents * kernels[:, None]).sum(2).permute(0, 2, 3, 1)
    assert relative_error(upsampler(features, picture(1, 6, 8, 3), (6, 8)), expected) <= 1e-12


def test_sapa_is_its_formula() -> None:
    upsampler = learned("sapa").double()
    features, image, h, w = random(1, 3, 4, CHANNELS).double(), torch.rand(1, 6, 8, 3).double(), 3, 4
    stage = upsampler.stages[0]
    queries = stage.query(_edges(image.permute(0, 3, 1, 2), 1) * 2 - 1)[0]
    keys = stage.key(upsampler.compress(features))[0]
    expected = torch.zeros(1, 6, 8, CHANNELS).double()
    for y, x in product(range(6), range(8)):
        places = [
            (min(max(y // 2 + i, 0), h - 1), min(max(x // 2 + j, 0), w - 1))
            for i, j in product(range(-2, 3), range(-2, 3))
        ]
        similarity = torch.stack([queries[:, y, x] @ keys[place] for place in places]) / math.sqrt(32)
        weighted = [a * features[0][place] for a, place in zip(similarity.softmax(0), places, strict=True)]
        expected[0, y, x] = torch.stack(weighted).sum(0)
    assert relative_error(upsampler(features, image, (6, 8)), expected) <= 1e-12


@reassembly
def test_stages_compress_the_upsampled_features(name: str) -> None:
    """Two stages at once, with the compression upsampled, are one stage and then another on its result."""
    upsampler = learned(name).double()
    second = learned(name).double()
    second.stages = upsampler.stages[1:]
    features, image = random(1, 3, 4, CHANNELS).double(), picture(1, 12, 16, 3)
    halfway = upsampler(features, image, (6, 8))
    expected = second(halfway, image, (12, 16))
    assert relative_error(upsampler(features, image, (12, 16)), expected) <= 1e-12


def test_sapa_looks_at_the_image_and_carafe_does_not() -> None:
    features = random(1, 4, 5, CHANNELS)
    for name, same in (("sapa", False), ("carafe", True)):
        upsampler = learned(name)
        one, other = (upsampler(features, picture(1, side, 20, 3), (16, 20)) for side in (16, 17))
        assert torch.equal(one, other) == same, name


def test_resize_conv_is_its_formula() -> None:
    upsampler = learned("resize_conv")
    features, sizes = random(1, 5, 7, CHANNELS), [(10, 14), (20, 28), (31, 45)]

    def interpolated(x: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.interpolate(x, size, mode="bilinear", align_corners=False)

    narrow = upsampler.compress(features).permute(0, 3, 1, 2)
    for stage, size in zip(upsampler.stages, sizes, strict=False):
        narrow = interpolated(narrow, size)
        result = functional.gelu(stage.spread(functional.pad(narrow, (1, 1, 1, 1), mode="reflect")))
        narrow = narrow + stage.mix(result.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    bilinear = interpolated(features.permute(0, 3, 1, 2), sizes[-1]).permute(0, 2, 3, 1)
    expected = bilinear + upsampler.expand(narrow.permute(0, 2, 3, 1))
    assert relative_error(upsampler(features, picture(1, 31, 45, 3), (31, 45)), expected) <= TOLERANCE


def test_ifa_is_its_formula() -> None:
    """One position after the other, the perceptron's first layer on the feature and the encoding together."""
    upsampler = learned("ifa").double()
    (h, w), (height, width) = (3, 4), (7, 9)
    features = random(1, h, w, CHANNELS).double()
    first = torch.cat([upsampler.from_features.weight, *(layer.weight for layer in upsampler.from_offset)], 1)

    def encoded(offset: float) -> list[float]:
        angles = [offset * math.pi * 2**octave for octave in range(4)]
        return [offset, *map(math.sin, angles), *map(math.cos, angles)]

    expected = torch.zeros(1, height, width, CHANNELS).double()
    for y, x in product(range(height), range(width)):
        at_y, at_x = (y + 0.5) * h / height - 0.5, (x + 0.5) * w / width - 0.5
        for i, j in product((math.floor(at_y), math.floor(at_y) + 1), (math.floor(at_x), math.floor(at_x) + 1)):
            share = (1 - abs(at_y - i)) * (1 - abs(at_x - j))
            near = min(max(i, 0), h - 1), min(max(j, 0), w - 1)
            feature = features[0][near]
            offset = torch.tensor([*encoded(at_y - near[0]), *encoded(at_x - near[1])]).double()
            hidden = functional.gelu(first @ torch.cat([feature, offset]) + upsampler.from_features.bias)
            output = upsampler.expand(functional.gelu(upsampler.hidden(hidden)))
            expected[0, y, x] += share * (feature + output)
    # The taps' weights are float32.
    assert relative_error(upsampler(features, picture(1, 7, 9, 3), (height, width)), expected) <= 1e-6

"""The paper's baselines: each against its formula written a second way, and what every upsampler owes the trainer."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.evaluation.large_image import large_image_features, strided_features
from featup.upsamplers import (
    CARAFE,
    IFA,
    JBU,
    SAPA,
    ChannelMap,
    DeepImagePrior,
    Interpolate,
    ResizeConv,
    TrainableName,
    Upsampler,
    create_trainable,
)
from featup.upsamplers.base import stage_sizes
from tests.featup.upsamplers.test_upsamplers import LargestTensor, picture, random, relative_error

TOLERANCE = 1e-5
CHANNELS = 5

LEARNED: dict[str, Callable[..., Any]] = {"resize_conv": ResizeConv, "carafe": CARAFE, "sapa": SAPA, "ifa": IFA}
every_learned = pytest.mark.parametrize("name", LEARNED)
reassembly = pytest.mark.parametrize("name", ["carafe", "sapa"])
starts_bilinear = pytest.mark.parametrize("name", ["resize_conv", "ifa"])
SIZES = [
    ((14, 14), (224, 224)),
    ((16, 16), (224, 224)),
    ((6, 5), (6, 5)),
    ((6, 5), (6, 17)),
    ((5, 7), (31, 45)),
    ((4, 3), (5, 4)),
    ((1, 1), (5, 3)),
]


def randomised(upsampler: Upsampler, seed: int = 0) -> Any:
    """Every parameter matters, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in upsampler.parameters():
            fan_in = math.prod(parameter.shape[1:])
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / math.sqrt(fan_in))
    return upsampler


def made(name: str, channels: int = CHANNELS, **options: Any) -> Any:
    if name == "deep_image_prior":
        return DeepImagePrior(steps=3, width=8)
    return randomised(LEARNED[name](channels, **options)).requires_grad_(False)


every_baseline = pytest.mark.parametrize("name", [*LEARNED, "deep_image_prior"])


# The protocol


@every_baseline
@pytest.mark.parametrize(("low", "size"), SIZES, ids=[f"{low}-{size}" for low, size in SIZES])
def test_size_is_exactly_what_was_asked_for(name: str, low: tuple[int, int], size: tuple[int, int]) -> None:
    features = random(1, *low, CHANNELS)
    before = features.clone()
    result = made(name)(features, picture(1, 29, 43, 3), size)
    assert result.shape == (1, *size, CHANNELS)
    assert result.isfinite().all()
    assert torch.equal(features, before), "the caller's features were written to"


@every_baseline
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("low", [(1, 1), (3, 5), (7, 9)], ids=str)
def test_an_image_does_not_depend_on_its_batch(name: str, low: tuple[int, int], projected: bool) -> None:
    size = (low[0] * 3, low[1] * 2)
    features, image = random(4, *low, CHANNELS), picture(4, *size, 3)
    projection = ChannelMap(random(2, CHANNELS), random(2)) if projected else None
    upsampler = made(name)
    together = upsampler(features, image, size, projection)
    for index in range(4):
        one = slice(index, index + 1)
        alone = upsampler(features[one].clone(), image[one].clone(), size, projection)
        assert torch.equal(alone, together[one]), f"image {index}"


@every_baseline
@pytest.mark.parametrize("kept", [2, 9], ids=["fewer", "more"])
@pytest.mark.parametrize("size", [(16, 20), (27, 31), (4, 5)], ids=str)
def test_projection_equals_projecting_afterwards(name: str, kept: int, size: tuple[int, int]) -> None:
    """The kernels come from the features, not from their projection."""
    features, image = random(2, 4, 5, CHANNELS).double(), picture(2, 26, 31, 3)
    projection = ChannelMap(random(kept, CHANNELS).double(), 3 + random(kept).double())
    upsampler = made(name).double()
    afterwards = upsampler(features, image, size) @ projection.weight.T + projection.bias
    assert relative_error(upsampler(features, image, size, projection), afterwards) <= 1e-12


@every_baseline
def test_out_and_inference_mode_give_the_same(name: str) -> None:
    features, image = random(2, 4, 5, CHANNELS), picture(2, 20, 31, 3)
    projection = ChannelMap(random(2, CHANNELS), random(2))
    upsampler = made(name)
    expected = upsampler(features, image, (20, 31), projection)
    with torch.inference_mode():
        inferred = upsampler(features.clone(), image.clone(), (20, 31), projection)
        out = torch.full((2, 20, 31, 2), torch.nan, dtype=torch.float16)
        assert upsampler(features, image, (20, 31), projection, out) is out
    assert relative_error(inferred, expected) <= TOLERANCE
    assert torch.equal(out, inferred.half())


@every_learned
@pytest.mark.parametrize("size", [(20, 24), (37, 31)], ids=["doubling", "odd"])
def test_bands_change_nothing(name: str, size: tuple[int, int]) -> None:
    features, image = random(1, 5, 6, CHANNELS), picture(1, 37, 31, 3)
    upsampler = made(name)
    whole = upsampler(features, image, size)
    for tile_pixels in (1, size[1] * 5, size[1] * (size[0] - 1)):
        upsampler.tile_pixels = tile_pixels
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                banded = upsampler(features, image, size)
            assert relative_error(banded, whole) <= TOLERANCE, f"tile_pixels={tile_pixels}, gradients {grad}"


@every_learned
def test_no_map_of_all_channels_at_high_resolution(name: str) -> None:
    """What the trainer relies on: few channels out of many cost a few."""
    upsampler = LEARNED[name](512, width=16)
    features, image = random(1, 8, 8, 512), picture(1, 64, 64, 3)
    with LargestTensor() as seen:
        upsampler(features, image, (64, 64), ChannelMap(random(3, 512), random(3)))
    # A kernel is 25 numbers, an image embedding 32, and a whole map of the features would be 512.
    assert seen.elements <= 66 * 66 * 32


@every_learned
def test_memory_is_bounded_by_the_tile(name: str) -> None:
    """With the result given, nothing is larger than the image or the map before the last stage."""
    upsampler = made(name, channels=16, width=8, tile_pixels=128)
    out = torch.empty(1, 128, 128, 16)
    with torch.no_grad(), LargestTensor(out) as seen:
        upsampler(random(1, 32, 32, 16), picture(1, 128, 128, 3), (128, 128), out=out)
    assert 0 < seen.elements <= 130 * 130 * 4


# Gradients


@every_learned
@pytest.mark.parametrize("size", [(4, 6), (7, 5)], ids=["doubling", "odd"])
def test_gradients(name: str, size: tuple[int, int]) -> None:
    """Of the projected result, by all parameters and by the features, in several bands."""
    options = {"width": 4, "tile_pixels": 2 * size[1]}
    upsampler = randomised(LEARNED[name](3, **options)).double()
    features, image = random(1, 2, 3, 3).double().requires_grad_(), picture(1, 9, 8, 3)
    projection = ChannelMap(random(2, 3).double(), random(2).double())
    run_through = len(stage_sizes((2, 3), size))
    used = {n: p for n, p in upsampler.named_parameters() if not n.startswith("stages.") or int(n[7]) < run_through}

    def run(*_: Tensor) -> Tensor:
        result: Tensor = upsampler(features, image, size, projection)
        return result

    run().square().sum().backward()
    for parameter_name, parameter in used.items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 1e-9, parameter_name
    assert torch.autograd.gradcheck(run, (features, *used.values()), fast_mode=True)


@pytest.mark.parametrize(
    ("name", "steps", "share"), [("resize_conv", 40, 0.7), ("carafe", 15, 0.75), ("sapa", 15, 0.1), ("ifa", 30, 0.93)]
)
def test_training_reduces_the_loss(name: str, steps: int, share: float) -> None:
    """Sharp discs, seen as means over 4x4 cells, back at their own resolution; only SAPA sees their edges."""
    torch.manual_seed(0)
    upsampler = LEARNED[name](CHANNELS)
    image, sharp = _discs(2, 0)
    low = functional.avg_pool2d(sharp.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    optimiser = torch.optim.Adam(upsampler.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = functional.mse_loss(upsampler(low, image, (28, 36)), sharp)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < share * losses[0], f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}"


def _discs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of discs ``[B, 28, 36, 3]`` and features that follow their edges ``[B, 28, 36, CHANNELS]``."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(36.0), indexing="ij")
    inside = torch.zeros(count, 28, 36)
    for one in inside:
        for _ in range(3):
            cy, cx, radius = (torch.rand(3, generator=generator) * torch.tensor([28, 36, 5])).tolist()
            one[(y - cy) ** 2 + (x - cx) ** 2 < (radius + 4) ** 2] = 1
    image = torch.stack([inside, 0.5 * inside, 1 - inside], -1)
    direction = torch.linspace(-1, 1, CHANNELS)
    return image, inside[..., None] * direction


@pytest.mark.parametrize("name", get_args(TrainableName))
def test_create_trainable(name: TrainableName) -> None:
    torch.manual_seed(3)
    first = create_trainable(name, 7)
    torch.manual_seed(3)
    second = create_trainable(name, 7)
    assert first.name == name
    assert first.training
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert isinstance(first, JBU if name == "jbu" else LEARNED[name])
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_errors() -> None:
    with pytest.raises(GeometryError, match=r"no upsampler 'bilinear' to train; there are jbu, resize_conv, carafe"):
        create_trainable("bilinear", 3)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match=r"carafe: made for 5 channels, got features of 6"):
        CARAFE(5)(random(1, 2, 2, 6), picture(1, 4, 4, 3), (4, 4))
    for name in ("resize_conv", "carafe", "sapa"):
        with pytest.raises(GeometryError, match=rf"{name}: \(2, 3\) to \(9, 9\).* takes 3 doublings.* 2 .*\(8, 12\)"):
            LEARNED[name](5, stages=2)(random(1, 2, 3, 5), picture(1, 9, 9, 3), (9, 9))
    for options in ({"steps": 0}, {"width": 6}, {"drive": "video"}):
        with pytest.raises(GeometryError, match=r"deep_image_prior: steps="):
            DeepImagePrior(**options)  # type: ignore[arg-type]


# The formulas


@starts_bilinear
@pytest.mark.parametrize(("low", "size"), [((4, 5), (16, 20)), ((5, 7), (31, 45))], ids=["doubling", "odd"])
def test_untrained_is_bilinear(name: str, low: tuple[int, int], size: tuple[int, int]) -> None:
    features, image = random(2, *low, CHANNELS), picture(2, *size, 3)
    found = LEARNED[name](CHANNELS)(features, image, size)
    assert torch.equal(found, Interpolate("bilinear")(features, image, size))


@reassembly
@pytest.mark.parametrize("size", [(16, 20), (27, 31), (5, 5)], ids=str)
def test_kernels_sum_to_one(name: str, size: tuple[int, int]) -> None:
    constant = random(1, 1, 1, CHANNELS)
    found = made(name)(constant.expand(1, 4, 5, CHANNELS), picture(1, *size, 3), size)
    assert relative_error(found, constant.expand(1, *size, CHANNELS)) <= TOLERANCE


@reassembly
def test_results_are_within_the_range_of_the_features(name: str) -> None:
    features = random(1, 4, 5, CHANNELS)
    found = made(name)(features, picture(1, 27, 31, 3), (27, 31))
    assert found.max() <= features.max() + TOLERANCE
    assert found.min() >= features.min() - TOLERANCE


def test_untrained_carafe_keeps_a_ramp() -> None:
    """Its Gaussians lie about the children's places, up and down, left and right."""
    ramp = torch.stack(torch.meshgrid(torch.arange(10.0), -torch.arange(12.0), indexing="ij"), -1)[None]
    torch.manual_seed(0)
    found = CARAFE(2).requires_grad_(False)(ramp, picture(1, 20, 24, 3), (20, 24))
    exact = Interpolate("bilinear")(ramp, picture(1, 20, 24, 3), (20, 24))
    within = (slice(None), slice(4, -4), slice(4, -4))
    assert float((found - exact)[within].abs().max()) <= 0.1


def _edges(x: Tensor, by: int) -> Tensor:
    return functional.pad(x, (by, by, by, by), mode="replicate")


def test_carafe_is_its_formula() -> None:
    """As in the paper: pixel shuffle of the encoder's channels, softmax, the parent's unfolded window."""
    upsampler = made("carafe").double()
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
    upsampler = made("sapa").double()
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
    upsampler = made(name).double()
    second = made(name).double()
    second.stages = upsampler.stages[1:]
    features, image = random(1, 3, 4, CHANNELS).double(), picture(1, 12, 16, 3)
    halfway = upsampler(features, image, (6, 8))
    expected = second(halfway, image, (12, 16))
    assert relative_error(upsampler(features, image, (12, 16)), expected) <= 1e-12


def test_sapa_looks_at_the_image_and_carafe_does_not() -> None:
    features = random(1, 4, 5, CHANNELS)
    for name, same in (("sapa", False), ("carafe", True)):
        upsampler = made(name)
        one, other = (upsampler(features, picture(1, side, 20, 3), (16, 20)) for side in (16, 17))
        assert torch.equal(one, other) == same, name


def test_resize_conv_is_its_formula() -> None:
    upsampler = made("resize_conv")
    features, sizes = random(1, 5, 7, CHANNELS), [(10, 14), (20, 28), (31, 45)]

    def interpolated(x: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.interpolate(x, size, mode="bilinear", align_corners=False)

    narrow = upsampler.compress(features).permute(0, 3, 1, 2)
    for stage, size in zip(upsampler.stages, sizes, strict=False):
        narrow = interpolated(narrow, size)
        found = functional.gelu(stage.spread(functional.pad(narrow, (1, 1, 1, 1), mode="reflect")))
        narrow = narrow + stage.mix(found.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    plain = interpolated(features.permute(0, 3, 1, 2), sizes[-1]).permute(0, 2, 3, 1)
    expected = plain + upsampler.expand(narrow.permute(0, 2, 3, 1))
    assert relative_error(upsampler(features, picture(1, 31, 45, 3), (31, 45)), expected) <= TOLERANCE


def test_ifa_is_its_formula() -> None:
    """One position after the other, the perceptron's first layer on the feature and the encoding together."""
    upsampler = made("ifa").double()
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
            answer = upsampler.expand(functional.gelu(upsampler.hidden(hidden)))
            expected[0, y, x] += share * (feature + answer)
    # The taps' weights are float32.
    assert relative_error(upsampler(features, picture(1, 7, 9, 3), (height, width)), expected) <= 1e-6


# The deep image prior


@pytest.mark.parametrize("drive", ["image", "noise"])
def test_deep_image_prior_explains_the_features(drive: Any) -> None:
    image, sharp = _discs(1, 0)
    low = functional.avg_pool2d(sharp.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1) + 10
    found = DeepImagePrior(steps=150, width=16, drive=drive)(low, image, (28, 36))
    means = functional.avg_pool2d(found.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    assert float((means - low).square().mean() / low.var()) <= 0.02
    if drive == "image":
        blind = Interpolate("bilinear")(low, image, (28, 36))
        assert functional.mse_loss(found - 10, sharp) < 0.5 * functional.mse_loss(blind - 10, sharp)


def test_deep_image_prior_is_deterministic() -> None:
    features, image = random(1, 3, 4, CHANNELS), picture(1, 13, 17, 3)
    state = torch.get_rng_state()
    for drive in ("image", "noise"):
        one, again, other = (
            DeepImagePrior(steps=5, width=8, seed=seed, drive=drive)(features, image, (13, 17))  # type: ignore[arg-type]
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"


def test_deep_image_prior_keeps_constants() -> None:
    constant = random(1, 1, 1, CHANNELS).expand(1, 3, 4, CHANNELS)
    found = DeepImagePrior(steps=5, width=8)(constant, picture(1, 13, 17, 3), (13, 17))
    assert relative_error(found, constant[:, :1, :1].expand(1, 13, 17, CHANNELS)) <= TOLERANCE


# The backbone alone


class Averages(nn.Module):
    """A patch embedding whose answers are known: each patch's mean colour."""

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward_intermediates(self, images: Tensor, **_: Any) -> list[Tensor]:
        return [functional.avg_pool2d(images, self.stride)]


def averages(stride: tuple[int, int], fixed: tuple[int, int] | None = None) -> Backbone:
    return Backbone(
        Averages(stride),
        name="averages",
        layer=0,
        stride=stride,
        channels=3,
        norm="none",
        final_norm=False,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        input_size=fixed or (224, 224),
        fixed=fixed is not None,
        crop=1.0,
        interpolation="bicubic",
        digest="",
    )


def ramp(height: int, width: int) -> Tensor:
    """uint8 ``[1, H, W, 3]``: the row, the column, and their sum."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, y + x], -1)[None].byte()


def ramp_at_cells(backbone: Backbone, size: Sequence[int], factor: int) -> Tensor:
    """What the ramp is at the centres of cells ``factor`` times finer than the backbone's."""
    steps = [step / factor for step in backbone.stride]
    y, x = ((torch.arange(round(side / step)) + 0.5) * step - 0.5 for side, step in zip(size, steps, strict=True))
    y, x = torch.meshgrid(y, x, indexing="ij")
    value = torch.stack([y, x, y + x], -1)[None] / 255
    return (value - torch.tensor(backbone.mean)) / torch.tensor(backbone.std)


@pytest.mark.parametrize(
    ("stride", "factor"),
    [((16, 16), 2), ((16, 16), 4), ((14, 14), 2), ((8, 16), 3), ((4, 4), 1)],
    ids=["whole-pixels", "factor4", "half-pixels", "thirds", "factor1"],
)
def test_strided_features_lie_where_their_cells_are(stride: tuple[int, int], factor: int) -> None:
    backbone, size = averages(stride), (5 * stride[0], 6 * stride[1])
    found = strided_features(backbone, ramp(*size), factor)
    assert found.shape == (1, 5 * factor, 6 * factor, 3)
    within = (slice(None), slice(factor, -factor), slice(factor, -factor))
    expected = ramp_at_cells(backbone, size, factor)
    assert float((found - expected)[within].abs().max()) <= 1e-5


def test_strided_features_reflect_at_the_border() -> None:
    backbone, image = averages((4, 4)), picture(2, 12, 16, 3)
    padded = functional.pad(backbone.normalise(image), (1, 1, 1, 1), mode="reflect")
    found = strided_features(backbone, image, 2)
    for i, j in product(range(2), range(2)):
        shifted = padded[:, :, 2 * i : 2 * i + 12, 2 * j : 2 * j + 16]
        assert relative_error(found[:, i::2, j::2], backbone.features(shifted)) <= TOLERANCE


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_large_image_features_lie_where_their_cells_are(factor: int) -> None:
    backbone, size = averages((8, 16)), (40, 96)
    found = large_image_features(backbone, ramp(*size), factor)
    assert found.shape == (1, 5 * factor, 6 * factor, 3)
    within = (slice(None), slice(factor, -factor), slice(factor, -factor))
    # Half a grey level, from rounding the resized image.
    limit = 0.5 / 255 / min(backbone.std) + 1e-5
    assert float((found - ramp_at_cells(backbone, size, factor))[within].abs().max()) <= limit


def test_large_images_stay_within_black_and_white() -> None:
    """Bicubic overshoots at an edge, and beyond white a byte would begin again at black."""
    backbone, image = averages((1, 1)), torch.zeros(1, 6, 8, 3, dtype=torch.uint8)
    image[:, :, 4:] = 255
    found = large_image_features(backbone, image, 2) * torch.tensor(backbone.std) + torch.tensor(backbone.mean)
    columns = found[0, 5, :, 0]
    assert all(left <= right + TOLERANCE for left, right in pairwise(columns.tolist()))


def test_finer_features_that_cannot_be_had() -> None:
    image = picture(1, 16, 16, 3)
    with pytest.raises(GeometryError, match=r"factor=0: .* from 1 to 4, the stride in pixels"):
        strided_features(averages((4, 8)), image, 0)
    with pytest.raises(GeometryError, match=r"factor=5: .* from 1 to 4"):
        strided_features(averages((4, 8)), image, 5)
    with pytest.raises(GeometryError, match=r"factor=0: .* at least 1"):
        large_image_features(averages((4, 8)), image, 0)
    for finer in (large_image_features, strided_features):
        with pytest.raises(GeometryError, match=r"images must be uint8 \[B, H, W, 3\], got torch.float32"):
            finer(averages((4, 8)), image / 255, 2)
    with pytest.raises(GeometryError, match=r"averages was made for images of 16x16 .* cannot take 32x32"):
        large_image_features(averages((4, 4), fixed=(16, 16)), image, 2)

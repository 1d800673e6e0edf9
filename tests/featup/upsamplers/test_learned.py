"""The protocol of the trained baselines, their gradients and their training."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.upsamplers import (
    CARAFE,
    JBU,
    AnyUp,
    ChannelMap,
    DeepImagePrior,
    TrainableName,
    create_trainable,
)
from featup.upsamplers.base import stage_sizes
from tests.featup.support import CHANNELS, TOLERANCE, LargestTensor, picture, random, relative_error
from tests.featup.upsamplers.support import LEARNED, discs, learned, randomised

every_learned = pytest.mark.parametrize("name", LEARNED)
SIZES = [
    ((14, 14), (224, 224)),
    ((16, 16), (224, 224)),
    ((6, 5), (6, 5)),
    ((6, 5), (6, 17)),
    ((5, 7), (31, 45)),
    ((4, 3), (5, 4)),
    ((1, 1), (5, 3)),
]


def create(name: str, channels: int = CHANNELS, **options: Any) -> Any:
    if name == "deep_image_prior":
        return DeepImagePrior(steps=3, width=8)
    return learned(name, channels, **options)


every_baseline = pytest.mark.parametrize("name", [*LEARNED, "deep_image_prior"])


@every_baseline
@pytest.mark.parametrize(("low", "size"), SIZES, ids=[f"{low}-{size}" for low, size in SIZES])
def test_size_is_exactly_what_was_asked_for(name: str, low: tuple[int, int], size: tuple[int, int]) -> None:
    features = random(1, *low, CHANNELS)
    before = features.clone()
    result = create(name)(features, picture(1, 29, 43, 3), size)
    assert result.shape == (1, *size, CHANNELS)
    assert result.isfinite().all()
    assert torch.equal(features, before), "the caller's features were written to"


@every_baseline
@pytest.mark.parametrize("projected", [False, True], ids=["all-channels", "projected"])
@pytest.mark.parametrize("low", [(1, 1), (3, 5), (7, 9)], ids=str)
def test_an_image_does_not_depend_on_its_batch(name: str, low: tuple[int, int], projected: bool) -> None:
    size = (low[0] * 3, low[1] * 2)
    features, image = random(4, *low, CHANNELS), picture(4, *size, 3)
    projection = ChannelMap(random(2, CHANNELS), random(2)) if projected else None
    upsampler = create(name)
    together = upsampler(features, image, size, projection)
    for index in range(4):
        image_slice = slice(index, index + 1)
        separate = upsampler(features[image_slice].clone(), image[image_slice].clone(), size, projection)
        assert torch.equal(separate, together[image_slice]), f"image {index}"


@every_baseline
@pytest.mark.parametrize("outputs", [2, 9], ids=["fewer", "more"])
@pytest.mark.parametrize("size", [(16, 20), (27, 31), (4, 5)], ids=str)
def test_projection_equals_projecting_afterwards(name: str, outputs: int, size: tuple[int, int]) -> None:
    """The kernels come from the features, not from their projection."""
    features, image = random(2, 4, 5, CHANNELS).double(), picture(2, 26, 31, 3)
    projection = ChannelMap(random(outputs, CHANNELS).double(), 3 + random(outputs).double())
    upsampler = create(name).double()
    afterwards = upsampler(features, image, size) @ projection.weight.T + projection.bias
    assert relative_error(upsampler(features, image, size, projection), afterwards) <= 1e-12


@every_baseline
def test_out_and_inference_mode_give_the_same(name: str) -> None:
    features, image = random(2, 4, 5, CHANNELS), picture(2, 20, 31, 3)
    projection = ChannelMap(random(2, CHANNELS), random(2))
    upsampler = create(name)
    expected = upsampler(features, image, (20, 31), projection)
    with torch.inference_mode():
        inferred = upsampler(features.clone(), image.clone(), (20, 31), projection)
        out = torch.full((2, 20, 31, 2), torch.nan, dtype=torch.float16)
        assert upsampler(features, image, (20, 31), projection, out) is out
    assert relative_error(inferred, expected) <= TOLERANCE
    assert torch.equal(out, inferred.half())


@every_learned
@pytest.mark.parametrize("size", [(20, 24), (37, 31)], ids=["factor2", "odd"])
def test_row_tiles_change_nothing(name: str, size: tuple[int, int]) -> None:
    features, image = random(1, 5, 6, CHANNELS), picture(1, 37, 31, 3)
    upsampler = create(name)
    whole = upsampler(features, image, size)
    for tile_pixels in (1, size[1] * 5, size[1] * (size[0] - 1)):
        upsampler.tile_pixels = tile_pixels
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                tiled = upsampler(features, image, size)
            assert relative_error(tiled, whole) <= TOLERANCE, f"tile_pixels={tile_pixels}, gradients {grad}"


@every_learned
def test_no_map_of_all_channels_at_high_resolution(name: str) -> None:
    """The trainer relies on it: a few of many channels cost a few."""
    upsampler = LEARNED[name](512, width=16)
    features, image = random(1, 8, 8, 512), picture(1, 64, 64, 3)
    with LargestTensor() as largest:
        upsampler(features, image, (64, 64), ChannelMap(random(3, 512), random(3)))
    # A kernel is 25 numbers, an image embedding 32, and a whole map of the features would be 512.
    assert largest.elements <= 66 * 66 * 32


@every_learned
def test_memory_is_bounded_by_the_tile(name: str) -> None:
    """With the result given, nothing is larger than the image or the map before the last stage."""
    upsampler = create(name, channels=16, width=8, tile_pixels=128)
    out = torch.empty(1, 128, 128, 16)
    with torch.no_grad(), LargestTensor(out) as largest:
        upsampler(random(1, 32, 32, 16), picture(1, 128, 128, 3), (128, 128), out=out)
    assert 0 < largest.elements <= 130 * 130 * 4


@every_learned
@pytest.mark.parametrize("size", [(4, 6), (7, 5)], ids=["factor2", "odd"])
def test_gradients(name: str, size: tuple[int, int]) -> None:
    """Of the projected result, by all parameters and by the features, in several row tiles."""
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
    """Sharp discs, averaged over 4x4 cells, are upsampled again; only SAPA reads their edges in the image."""
    torch.manual_seed(0)
    upsampler = LEARNED[name](CHANNELS)
    image, sharp = discs(2, 0)
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


@pytest.mark.parametrize("name", [*get_args(TrainableName), "anyup"])
def test_create_trainable(name: TrainableName) -> None:
    torch.manual_seed(3)
    first = create_trainable(name, 7)
    torch.manual_seed(3)
    second = create_trainable(name, 7)
    assert first.name == name
    assert first.training
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert isinstance(first, {"jbu": JBU, "anyup": AnyUp}.get(name) or LEARNED[name])
    for parameter, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_trainable_upsamplers_take_stages_and_a_width() -> None:
    for name in ("jbu", "resize_conv", "carafe", "sapa"):
        upsampler = create_trainable(name, 7, stages=5, width=8)  # type: ignore[arg-type]
        assert len(upsampler.stages) == 5  # type: ignore[arg-type]
        assert (upsampler.key_dim if name == "jbu" else upsampler.width) == 8
        assert upsampler(random(1, 1, 2, 7), picture(1, 32, 64, 3), (32, 64)).shape == (1, 32, 64, 7)
    for name in ("ifa", "anyup"):
        assert create_trainable(name, 7, width=8).width == 8  # type: ignore[arg-type]


def test_errors() -> None:
    with pytest.raises(GeometryError, match=r"no upsampler 'bilinear' to train; there are jbu, resize_conv, carafe"):
        create_trainable("bilinear", 3)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match=r"carafe: made for 5 channels, got features of 6"):
        CARAFE(5)(random(1, 2, 2, 6), picture(1, 4, 4, 3), (4, 4))
    for name in ("resize_conv", "carafe", "sapa"):
        with pytest.raises(
            GeometryError, match=rf"{name}: \(2, 3\) to \(9, 9\).* takes 3 2x stages.* 2; .*\(8, 12\).*--stages 3"
        ):
            LEARNED[name](5, stages=2)(random(1, 2, 3, 5), picture(1, 9, 9, 3), (9, 9))
    for options in ({"steps": 0}, {"width": 6}, {"drive": "video"}):
        with pytest.raises(GeometryError, match=r"deep_image_prior: steps="):
            DeepImagePrior(**options)  # type: ignore[arg-type]

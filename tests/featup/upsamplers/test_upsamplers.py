"""Upsamplers: their protocol, and each method against the original's values or its formula written a second way."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from featup.checkpoints import load_jbu, save_jbu
from featup.errors import GeometryError
from featup.upsamplers import JBU, Bilateral, ChannelMap, Interpolate, Upsampler, create_trainable, create_upsampler
from featup.upsamplers.base import stage_sizes
from featup.upsamplers.jbu import JBUStage
from featup.upsamplers.joint import JointUpsampler, resize_guidance

TOLERANCE = 1e-5
CHANNELS = 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def picture(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def random_jbu(channels: int = CHANNELS, seed: int = 0, **options: Any) -> JBU:
    """A stack whose every parameter matters: wide keys, sharp softmax, a correction that is not small."""
    jbu = JBU(channels, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in jbu.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() == 0 else 1 / math.sqrt(parameter.shape[-1])
            parameter.copy_(draw * scale + (0.8 if name.endswith("sigma_spatial") else 0.0))
    return jbu.eval()


def made(name: str) -> Upsampler:
    if name == "jbu":
        return random_jbu().requires_grad_(False)
    return create_upsampler(name, channels=CHANNELS)  # type: ignore[arg-type]


NAMES = ["nearest", "bilinear", "bicubic", "bilateral", "jbu"]
every_upsampler = pytest.mark.parametrize("name", NAMES)
joint_upsampler = pytest.mark.parametrize("name", ["bilateral", "jbu"])


# The protocol


@every_upsampler
@pytest.mark.parametrize(
    ("low", "guidance", "size"),
    [
        ((16, 16), (224, 224), (224, 224)),
        ((22, 30), (352, 480), (352, 480)),
        ((6, 5), (24, 20), (6, 5)),
        ((6, 5), (24, 20), (6, 17)),
        ((5, 7), (33, 47), (31, 45)),
        ((4, 3), (10, 9), (40, 31)),
        ((4, 3), (10, 90), (31, 40)),
        ((1, 1), (1, 1), (5, 3)),
    ],
    ids=["patch14", "not-square", "factor1", "factor1-high", "odd", "beyond-guidance", "beyond-one-side", "one-token"],
)
def test_size_is_exactly_what_was_asked_for(
    name: str, low: tuple[int, int], guidance: tuple[int, int], size: tuple[int, int]
) -> None:
    features = random(1, *low, CHANNELS)
    before = features.clone()
    result = made(name)(features, picture(1, *guidance, 3), size)
    assert result.shape == (1, *size, CHANNELS)
    assert result.isfinite().all()
    assert torch.equal(features, before), "the caller's features were written to"


@every_upsampler
def test_uint8_and_float_guidance_are_one_image(name: str) -> None:
    features, image = random(1, 4, 5, CHANNELS), picture(1, 29, 37, 3)
    upsampler = made(name)
    assert torch.equal(upsampler(features, image, (25, 33)), upsampler(features, image.float() / 255, (25, 33)))


@joint_upsampler
def test_bands_change_nothing(name: str) -> None:
    features, image = random(1, 5, 4, CHANNELS), picture(1, 37, 31, 3)
    upsampler = made(name)
    assert isinstance(upsampler, JointUpsampler)
    whole = upsampler(features, image, (37, 31))
    for tile_pixels in (1, 31 * 5, 31 * 36):
        upsampler.tile_pixels = tile_pixels
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                banded = upsampler(features, image, (37, 31))
            # The learned kernel's matrix products may round by the number of pixels, depending on the processor.
            limit = 0.0 if name == "bilateral" else 1e-6
            assert relative_error(banded, whole) <= limit, f"tile_pixels={tile_pixels}, gradients {grad}"


@every_upsampler
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("low", [(1, 1), (3, 5), (7, 9)], ids=str)
def test_an_image_does_not_depend_on_its_batch(name: str, low: tuple[int, int], projected: bool) -> None:
    """Bug: mixing the channels of the whole batch at once rounded by the batch's size."""
    size = (low[0] * 3, low[1] * 2)
    features, image = random(5, *low, CHANNELS), picture(5, *size, 3)
    projection = ChannelMap(random(1, CHANNELS), random(1)) if projected else None
    upsampler = made(name)
    together = upsampler(features, image, size, projection)
    for index in range(5):
        one = slice(index, index + 1)
        # Copies, because another address must not make a difference either.
        alone = upsampler(features[one].clone(), image[one].clone(), size, projection)
        assert torch.equal(alone, together[one]), f"image {index}"


@pytest.mark.parametrize("channels", [64, 67])
@pytest.mark.parametrize("kept", [1, 24])
def test_wide_projections_do_not_depend_on_the_batch(channels: int, kept: int) -> None:
    """The same at widths where the product runs in blocks."""
    jbu = random_jbu(channels, stages=1).requires_grad_(False)
    projection = ChannelMap(random(kept, channels), random(kept))
    features, image = random(4, 3, 5, channels), picture(4, 6, 10, 3)
    together = jbu(features, image, (6, 10), projection)
    apart = [jbu(features[i : i + 1].clone(), image[i : i + 1].clone(), (6, 10), projection) for i in range(4)]
    assert torch.equal(torch.cat(apart), together)


@every_upsampler
@pytest.mark.parametrize("kept", [2, 9], ids=["fewer", "more"])
def test_projection_equals_projecting_afterwards(name: str, kept: int) -> None:
    features, image = random(2, 4, 5, CHANNELS), picture(2, 26, 31, 3)
    projection = ChannelMap(random(kept, CHANNELS), 3 + random(kept))
    upsampler = made(name)
    afterwards = upsampler(features, image, (26, 31)) @ projection.weight.T + projection.bias
    assert relative_error(upsampler(features, image, (26, 31), projection), afterwards) <= TOLERANCE


def test_channel_maps_chain() -> None:
    first, second = ChannelMap(random(4, 3), random(4)), ChannelMap(random(2, 4, seed=1), random(2, seed=1))
    both, x = second.after(first), random(7, 3)
    expected = (x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert relative_error(x @ both.weight.T + both.bias, expected) <= TOLERANCE
    assert second.after(None) is second


@every_upsampler
def test_out_in_half_precision(name: str) -> None:
    features, image = random(3, 4, 5, CHANNELS), picture(3, 20, 31, 3)
    projection = ChannelMap(random(2, CHANNELS), random(2))
    upsampler = made(name)
    out = torch.full((3, 20, 31, 2), torch.nan, dtype=torch.float16)
    assert upsampler(features, image, (20, 31), projection, out) is out
    assert torch.equal(out, upsampler(features, image, (20, 31), projection).half())


@every_upsampler
def test_inference_mode_gives_the_same(name: str) -> None:
    features, image = random(2, 4, 5, CHANNELS), picture(2, 20, 31, 3)
    upsampler = made(name)
    with torch.inference_mode():
        inferred = upsampler(features, image, (20, 31))
    assert relative_error(inferred, upsampler(features, image, (20, 31))) <= TOLERANCE


@every_upsampler
def test_gradients_reach_the_features(name: str) -> None:
    """Against the adjoint: for a linear operator, <U x, y> is linear in x, with the gradient as its coefficients."""
    features = random(1, 3, 4, CHANNELS).requires_grad_()
    image, weights = picture(1, 11, 13, 3), random(1, 11, 13, CHANNELS)
    upsampler = made(name)
    zero = upsampler(torch.zeros_like(features), image, (11, 13)).detach()
    value = ((upsampler(features, image, (11, 13)) - zero) * weights).sum()
    value.backward()
    assert features.grad is not None
    assert relative_error((features.grad * features.detach()).sum(), value.detach()) <= 1e-4


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements any tensor had that an operator of torch returned while this was on, ``out`` left out."""

    def __init__(self, out: Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0
        self.out = None if out is None else out.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.out:
                self.elements = max(self.elements, tensor.numel())
        return result


@joint_upsampler
def test_memory_is_bounded_by_the_tile(name: str) -> None:
    features, image = random(1, 256, 256, 8), picture(1, 512, 512, 3)
    upsampler = Bilateral() if name == "bilateral" else random_jbu(8).requires_grad_(False)
    upsampler.tile_pixels = 4096
    with torch.no_grad(), LargestTensor() as seen:
        upsampler(features, image, (512, 512))
    assert seen.elements <= 512 * 512 * 8, "something larger than the result was allocated"


@every_upsampler
def test_a_given_out_is_the_only_whole_result(name: str) -> None:
    """What is left is the image, with the border that the windows reach into."""
    features, image = random(1, 40, 40, CHANNELS), picture(1, 160, 160, 3)
    upsampler = made(name)
    if isinstance(upsampler, JointUpsampler):
        upsampler.tile_pixels = 160
    out = torch.empty(1, 160, 160, CHANNELS, dtype=torch.float16)
    with torch.no_grad(), LargestTensor(out) as seen:
        upsampler(features, image, (160, 160), out=out)
    assert 0 < seen.elements <= 166 * 166 * 3


@every_upsampler
def test_bands_are_new_tensors_and_make_the_whole(name: str) -> None:
    upsampler = made(name)
    if isinstance(upsampler, JointUpsampler):
        upsampler.tile_pixels = 40
    for size in ((4, 5), (13, 10)):
        features, image = random(1, 4, 5, CHANNELS), picture(1, 13, 10, 3)
        bands = list(upsampler.bands(features, image, size))
        rows = [row for part, _ in bands for row in range(part.start, part.stop)]
        assert rows == list(range(size[0]))
        addresses = {features.data_ptr()} | {band.data_ptr() for _, band in bands}
        assert len(addresses) == 1 + len(bands), f"{size}: adding the bias would write to somebody else's tensor"


def test_the_memory_test_sees_what_it_looks_for() -> None:
    upsampler = Bilateral(tile_pixels=128 * 128)
    with torch.no_grad(), LargestTensor() as seen:
        upsampler(random(1, 64, 64, 8), picture(1, 128, 128, 3), (128, 128))
    assert seen.elements == 128 * 128 * 49


@every_upsampler
@pytest.mark.parametrize(
    ("features", "guidance", "text"),
    [
        ((4, 5, CHANNELS), (1, 8, 10, 3), "one batch"),
        ((1, 4, 5, CHANNELS), (8, 10, 3), "one batch"),
        ((1, 4, 5, CHANNELS), (1, 3, 8, 10), "channels-last"),
        ((2, 4, 5, CHANNELS), (1, 8, 10, 3), "one batch"),
        ((1, 9, 5, CHANNELS), (1, 8, 10, 3), r"cannot upsample \(9, 5\) \(height, width\) to the smaller \(8, 10\)"),
        ((1, 4, 11, CHANNELS), (1, 8, 10, 3), r"cannot upsample \(4, 11\)"),
    ],
    ids=["features-3d", "guidance-3d", "channels-first", "batches", "height", "width"],
)
def test_shapes_that_do_not_fit(name: str, features: tuple[int, ...], guidance: tuple[int, ...], text: str) -> None:
    with pytest.raises(GeometryError, match=rf"{name}: .*{text}"):
        made(name)(random(*features), torch.rand(guidance), (8, 10))


@every_upsampler
@pytest.mark.parametrize(
    "shape", [(2, 8, 10, CHANNELS), (1, 8, 10, 1), (1, 1, 10, CHANNELS), (8, 10, CHANNELS)], ids=str
)
def test_out_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    """Bug: whatever the result could be broadcast to was taken, and rows beyond the batch were left as they were."""
    with pytest.raises(GeometryError, match=rf"{name}: out must be \[1, 8, 10, {CHANNELS}\], got"):
        made(name)(random(1, 4, 5, CHANNELS), picture(1, 8, 10, 3), (8, 10), out=torch.zeros(shape))


@every_upsampler
def test_projection_of_other_features(name: str) -> None:
    with pytest.raises(GeometryError, match=rf"{name}: a projection of 4 channels cannot take features of {CHANNELS}"):
        made(name)(random(1, 4, 5, CHANNELS), picture(1, 8, 10, 3), (8, 10), ChannelMap(random(2, 4), random(2)))


sides = st.integers(1, 400)


@given(low=st.tuples(sides, sides), more=st.tuples(sides, sides))
def test_stage_sizes(low: tuple[int, int], more: tuple[int, int]) -> None:
    high = (low[0] + more[0] - 1, low[1] + more[1] - 1)
    sizes = [low, *stage_sizes(low, high)]
    assert sizes[-1] == high
    for before, after in pairwise(sizes):
        assert all(b <= a <= 2 * b for b, a in zip(before, after, strict=True)), (before, after)
    # No fewer stages would do: after one less, a side could not have grown so far.
    fewer = len(sizes) - 2
    assert low == high or any(side << fewer < top for side, top in zip(low, high, strict=True))


def test_stage_sizes_of_patch_14_and_16() -> None:
    assert stage_sizes((16, 16), (224, 224)) == [(32, 32), (64, 64), (128, 128), (224, 224)]
    assert stage_sizes((22, 30), (352, 480)) == [(44, 60), (88, 120), (176, 240), (352, 480)]
    assert stage_sizes((5, 5), (5, 5)) == []


@pytest.mark.parametrize(("low", "high"), [((8, 8), (7, 9)), ((8, 8), (9, 7)), ((0, 4), (4, 4))], ids=str)
def test_stages_do_not_go_down(low: tuple[int, int], high: tuple[int, int]) -> None:
    with pytest.raises(GeometryError, match=r"stages go up from at least 1x1: cannot reach"):
        stage_sizes(low, high)


def test_guidance_going_down_is_the_mean_of_each_cell() -> None:
    image = random(2, 12, 20, 3)
    expected = image.reshape(2, 4, 3, 5, 4, 3).mean((2, 4))
    assert relative_error(resize_guidance(image, (4, 5)), expected) <= TOLERANCE
    assert resize_guidance(image, (12, 20)) is image


def test_create_upsampler(tmp_path: Path) -> None:
    save_jbu(random_jbu(), tmp_path / "jbu.safetensors")
    for name in NAMES:
        upsampler = create_upsampler(name, channels=CHANNELS, checkpoint=tmp_path / "jbu.safetensors")  # type: ignore[arg-type]
        assert upsampler.name == name
        assert not upsampler.training
        assert not any(parameter.requires_grad for parameter in upsampler.parameters())
    with pytest.raises(GeometryError, match=r"jbu: made for 5 channels, got features of 6; use a checkpoint"):
        create_upsampler("jbu", channels=6, checkpoint=tmp_path / "jbu.safetensors")
    with pytest.raises(GeometryError, match=r"jbu needs a trained checkpoint .* 'bilateral'"):
        create_upsampler("jbu", channels=6)
    with pytest.raises(GeometryError, match=r"unknown upsampler 'loftup'; there are nearest, .*, jbu"):
        create_upsampler("loftup", channels=6)  # type: ignore[arg-type]


# Interpolation


@pytest.mark.parametrize("kind", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(4, 5), (8, 10), (17, 29)], ids=str)
def test_interpolation_is_that_of_torch(kind: Any, size: tuple[int, int]) -> None:
    features = random(2, 4, 5, CHANNELS)
    corners = {} if kind == "nearest" else {"align_corners": False}
    expected = functional.interpolate(features.movedim(-1, 1), size, mode=kind, **corners).movedim(1, -1)
    found = Interpolate(kind)(features, picture(2, 3, 3, 3), size)
    assert relative_error(found, expected) <= TOLERANCE


# The fixed kernel


@pytest.mark.parametrize("sigma_colour", [0.01, 0.2, 10.0])
def test_bilateral_keeps_constant_features(sigma_colour: float) -> None:
    value = random(CHANNELS)
    result = Bilateral(sigma_colour=sigma_colour)(value.expand(1, 4, 5, -1), picture(1, 29, 41, 3), (29, 41))
    assert relative_error(result, value.expand(1, 29, 41, -1)) <= TOLERANCE


def bilateral_stage(
    features: NDArray[np.float64], image: NDArray[np.float64], sigma_space: float, sigma_colour: float, radius: int
) -> NDArray[np.float64]:
    """One stage by the definition: ``[h, w, C]`` and ``[H, W, 3]`` in [0, 1] to ``[H, W, C]``."""
    height, width, _ = image.shape
    planes = torch.from_numpy(features).movedim(-1, 0)[None]
    large = functional.interpolate(planes, (height, width), mode="bicubic")[0].movedim(0, -1).numpy()
    around = ((radius, radius), (radius, radius), (0, 0))
    large, colour = np.pad(large, around, mode="reflect"), np.pad(2 * image - 1, around, mode="reflect")
    result = np.zeros((height, width, features.shape[-1]))
    for y in range(height):
        for x in range(width):
            weights = 0.0
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    there = (y + radius + dy, x + radius + dx)
                    difference = colour[y + radius, x + radius] - colour[there]
                    exponent = (dy**2 + dx**2) / sigma_space**2 + (difference**2).sum() / sigma_colour**2
                    weight = math.exp(-exponent / 2)
                    result[y, x] += weight * large[there]
                    weights += weight
            result[y, x] /= weights
    return result


@pytest.mark.parametrize(
    ("low", "high", "sigma_space", "sigma_colour", "radius"),
    [
        ((3, 4), (6, 8), 1.0, 0.2, 3),
        ((4, 3), (7, 6), 2.0, 0.7, 2),
        ((2, 2), (3, 4), 0.5, 3.0, 3),
        ((1, 2), (2, 2), 1.0, 1.0, 1),
        ((1, 1), (2, 1), 1.0, 0.5, 3),
    ],
    ids=["3x4", "non-integer", "shorter-than-the-window", "radius1", "one-token"],
)
def test_bilateral_by_brute_force(
    low: tuple[int, int], high: tuple[int, int], sigma_space: float, sigma_colour: float, radius: int
) -> None:
    features, image = random(1, *low, 2), torch.rand(1, *high, 3, generator=torch.Generator().manual_seed(3))
    expected = bilateral_stage(
        features[0].double().numpy(), image[0].double().numpy(), sigma_space, sigma_colour, radius
    )
    found = Bilateral(sigma_space, sigma_colour, radius)(features, image, high)
    assert relative_error(found[0], torch.from_numpy(expected)) <= TOLERANCE


def test_bilateral_follows_an_edge_that_bilinear_blurs() -> None:
    """Two regions whose border runs through the middle of tokens, seen sharply by the image only."""
    truth = torch.zeros(1, 64, 64, 1)
    truth[:, :, 29:] = 1
    features = truth.reshape(1, 8, 8, 8, 8, 1).mean((2, 4))
    image = (0.2 + 0.6 * truth).expand(-1, -1, -1, 3)

    def upsampled(name: Any, guidance: Tensor) -> tuple[float, float]:
        """Mean absolute error, and the step from the last column of one region to the first of the other."""
        result = create_upsampler(name, channels=1)(features, guidance, (64, 64))
        return float((result - truth).abs().mean()), float((result[:, :, 29] - result[:, :, 28]).mean())

    error, step = upsampled("bilateral", image)
    for rival, guidance in (("bilinear", image), ("bicubic", image), ("bilateral", 0 * image)):
        rival_error, rival_step = upsampled(rival, guidance)
        assert error < 0.8 * rival_error, (rival, error, rival_error)
        assert step > 3 * rival_step, (rival, step, rival_step)


@pytest.mark.parametrize(("space", "colour"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_bilateral_refuses_sigmas(space: float, colour: float) -> None:
    with pytest.raises(GeometryError, match=rf"sigma_space={space} and sigma_colour={colour} must both be positive"):
        Bilateral(space, colour)


def test_windows_have_a_radius() -> None:
    """Bug: a JBU of radius 0 was made, and failed in its first stage with shapes that led nowhere."""
    for make in (lambda: Bilateral(radius=0), lambda: JBU(3, radius=0)):
        with pytest.raises(GeometryError, match=r"(bilateral|jbu): radius=0 leaves no window"):
            make()


# The learned kernel


def equations_5_to_7(state: dict[str, Tensor], source: Tensor, guidance: Tensor, radius: int) -> Tensor:
    """One learned stage written from the paper, planes first: ``[B, C, h, w]``, ``[B, 3, H, W]`` to ``[B, C, H, W]``.

    Equation 5 is the weighted sum over the window, 6 the softmax of key products, 7 the Gaussian of the distance.
    """
    batch, _, height, width = guidance.shape
    side = 2 * radius + 1

    def pointwise(planes: Tensor, layer: str) -> Tensor:
        return functional.conv2d(planes, state[f"{layer}.weight"][:, :, None, None], state[f"{layer}.bias"])

    def windows(planes: Tensor) -> Tensor:
        """``[B, D, H, W]`` to ``[B, D, side * side, H, W]``."""
        beyond = functional.pad(planes, (radius,) * 4, mode="reflect")
        return functional.unfold(beyond, side).view(batch, planes.shape[1], side**2, height, width)

    keys = pointwise(functional.gelu(pointwise(guidance, "range_in")), "range_out")
    products = (keys[:, :, None] * windows(keys)).sum(1)
    in_range = torch.softmax(state["range_temp"].exp() * products, dim=1)
    distance = torch.arange(-radius, radius + 1).to(guidance) / radius
    squared = distance[:, None] ** 2 + distance[None, :] ** 2
    in_space = torch.exp(-squared / (2 * state["sigma_spatial"] ** 2)).view(1, -1, 1, 1)
    kernel = in_range * in_space
    kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
    correction = pointwise(functional.gelu(pointwise(torch.cat([kernel, guidance], 1), "fixup_in")), "fixup_out")
    large = functional.interpolate(source, (height, width), mode="bicubic", align_corners=False)
    return (windows(large) * (kernel + 0.1 * correction)[:, None]).sum(2)


def leaves(jbu: JBU) -> dict[str, Tensor]:
    """The parameters of the first stage, in float64, on their own graph."""
    return {name: p.detach().double().requires_grad_() for name, p in jbu.stages[0].named_parameters()}


@pytest.mark.parametrize(
    ("low", "high", "radius", "key_dim"),
    [((5, 6), (10, 12), 3, 32), ((4, 5), (7, 9), 1, 8), ((7, 4), (11, 8), 2, 3)],
    ids=["usual", "radius1", "radius2"],
)
def test_stage_and_its_gradients_by_the_paper(
    low: tuple[int, int], high: tuple[int, int], radius: int, key_dim: int
) -> None:
    jbu = random_jbu(CHANNELS, seed=4, stages=1, radius=radius, key_dim=key_dim)
    state = leaves(jbu)
    source, guidance, weights = random(2, *low, CHANNELS), random(2, *high, 3), random(2, *high, CHANNELS)
    their_source, their_guidance = (t.double().movedim(-1, 1).requires_grad_() for t in (source, guidance))
    expected = equations_5_to_7(state, their_source, their_guidance, radius)
    torch.autograd.backward(expected, weights.double().movedim(-1, 1))

    with torch.no_grad():
        inferred = torch.cat([jbu.run_stage(0, source[i : i + 1], guidance[i : i + 1]) for i in range(2)])
    assert relative_error(inferred, expected.detach().movedim(1, -1)) <= TOLERANCE, "output of the cpu backend"

    jbu.double()
    our_source, our_guidance = (t.double().requires_grad_() for t in (source, guidance))
    trained = torch.cat([jbu.run_stage(0, our_source[i : i + 1], our_guidance[i : i + 1]) for i in range(2)])
    torch.autograd.backward(trained, weights.double())
    assert relative_error(trained.detach(), expected.detach().movedim(1, -1)) <= TOLERANCE, "output"
    for name, ours, theirs in (("source", our_source, their_source), ("guidance", our_guidance, their_guidance)):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad.movedim(1, -1)) <= TOLERANCE, f"gradient of {name}"
    for name, parameter in jbu.stages[0].named_parameters():
        gradient = state[name].grad
        assert gradient is not None
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradient) <= TOLERANCE, f"gradient of {name}"


def test_stage_at_its_limits() -> None:
    """Keys that shut out the centre and a Gaussian that shuts out the rest: the sum falls below the clamp of 1e-7."""
    jbu = random_jbu(seed=4, stages=1).requires_grad_(False)
    stage = jbu.stages[0]
    assert isinstance(stage, JBUStage)
    stage.range_temp.fill_(3.0)
    stage.sigma_spatial.fill_(0.05)
    source, guidance = random(1, 5, 6, CHANNELS), 3 * random(1, 10, 12, 3)
    planes = [t.double().movedim(-1, 1) for t in (source, guidance)]
    expected = equations_5_to_7(leaves(jbu), planes[0], planes[1], 3).detach().movedim(1, -1)
    assert relative_error(jbu.run_stage(0, source, guidance), expected) <= TOLERANCE
    kernel = stage(guidance).flatten(-2)
    stage.fixup_out.weight.zero_()
    stage.fixup_out.bias.zero_()
    sums = stage(guidance).flatten(-2).sum(-1)
    assert kernel.isfinite().all()
    assert sums.max() > 0.99
    assert sums.min() < 0.5, "no pixel reached the clamp"


def test_temperature_is_held_within_its_limits() -> None:
    stage = random_jbu(seed=4).requires_grad_(False).stages[0]
    assert isinstance(stage, JBUStage)
    guidance = random(1, 10, 12, 3)

    def at(range_temp: float) -> Tensor:
        stage.range_temp.fill_(range_temp)
        filters: Tensor = stage(guidance)
        return filters

    assert at(100.0).isfinite().all(), "exp(100) is beyond float32"
    assert relative_error(at(-100.0), at(math.log(1e-4))) <= TOLERANCE
    assert relative_error(at(-100.0), at(math.log(1e-3))) > TOLERANCE


def test_stack_by_the_paper() -> None:
    """Four stages, each guided by the image at its size, then the residual map of channels; ImageNet's colours."""
    jbu = random_jbu(seed=5)
    features, image = random(2, 4, 5, CHANNELS), picture(2, 64, 80, 3)
    x = features.double().movedim(-1, 1)
    colours = (image.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    for stage, side in enumerate((8, 16, 32, 64)):
        state = {name: p.detach().double() for name, p in jbu.stages[stage].named_parameters()}
        small = functional.adaptive_avg_pool2d(colours.movedim(-1, 1), (side, side * 5 // 4))
        x = equations_5_to_7(state, x, small, 3)
    weight, bias = jbu.fixup.weight.double(), jbu.fixup.bias.double()
    expected = x.movedim(1, -1)
    expected = (expected + 0.1 * (expected @ weight.T + bias)).detach()
    with torch.no_grad():
        assert relative_error(jbu(features, image, (64, 80)), expected) <= TOLERANCE, "no grad"
    assert relative_error(jbu(features, image, (64, 80)).detach(), expected) <= TOLERANCE, "with grad"


def test_jbu_says_how_far_it_goes() -> None:
    jbu = random_jbu(stages=2)
    with pytest.raises(
        GeometryError, match=r"\(4, 5\) to \(20, 20\) .* takes 3 doublings and the stack has 2.*\(16, 20"
    ):
        jbu(random(1, 4, 5, CHANNELS), picture(1, 20, 20, 3), (20, 20))
    with pytest.raises(GeometryError, match=r"jbu: made for 5 channels, got features of 4"):
        jbu(random(1, 4, 5, 4), picture(1, 20, 20, 3), (8, 10))


def test_every_parameter_learns() -> None:
    jbu = random_jbu(stages=2)
    jbu(random(1, 3, 4, CHANNELS), picture(1, 12, 16, 3), (12, 16)).square().sum().backward()
    for name, parameter in jbu.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


class Golden:
    """What the original implementation gave, channels-last, and our stack with its weights."""

    def __init__(self, arrays: Any, folder: Path) -> None:
        self.arrays = arrays
        self.folder = folder

    def map(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name]).movedim(1, -1)

    def state(self, case: str, kind: str, prefix: str = "") -> dict[str, Tensor]:
        start = f"{case}/{kind}/"
        names = [name for name in self.arrays.files if name.startswith(start)]
        return {prefix + name.removeprefix(start): torch.from_numpy(self.arrays[name]) for name in names}

    def jbu(self, state: dict[str, Tensor]) -> JBU:
        """Through an official checkpoint; the reference values were made from guidance normalised before."""
        torch.save({"state_dict": state}, self.folder / "official.ckpt")
        jbu = load_jbu(self.folder / "official.ckpt")
        jbu.guidance_mean, jbu.guidance_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return jbu


@pytest.fixture
def golden(shared: Path, tmp_path: Path) -> Iterator[Golden]:
    with np.load(shared / "golden" / "featup_reference.npz") as arrays:
        yield Golden(arrays, tmp_path)


@pytest.mark.parametrize("case", ["jbu_stack", "jbu_stack_oddguide"])
def test_stack_gives_what_the_original_gave(golden: Golden, case: str) -> None:
    jbu = golden.jbu(golden.state("jbu_stack", "state_dict", "upsampler."))
    source, guidance, expected = (
        golden.map("jbu_stack/source"),
        golden.map(f"{case}/guidance"),
        golden.map(f"{case}/output"),
    )
    size = (expected.shape[1], expected.shape[2])
    with torch.no_grad():
        assert relative_error(jbu(source, guidance, size), expected) <= TOLERANCE, "cpu backend"
    source.requires_grad_()
    assert relative_error(jbu(source, guidance, size).detach(), expected) <= TOLERANCE, "torch backend"


def test_stage_gives_what_the_original_gave(golden: Golden) -> None:
    source, guidance = golden.map("jbu_stage/source"), golden.map("jbu_stage/guidance")
    channels = source.shape[-1]
    rest = {"fixup_proj.1.weight": torch.zeros(channels, channels, 1, 1), "fixup_proj.1.bias": torch.zeros(channels)}
    jbu = golden.jbu(golden.state("jbu_stage", "state_dict", "up1.") | rest).requires_grad_(True)

    def run() -> Tensor:
        return torch.cat([jbu.run_stage(0, s[None], g[None]) for s, g in zip(source, guidance, strict=True)])

    with torch.no_grad():
        assert relative_error(run(), golden.map("jbu_stage/output")) <= TOLERANCE, "output of the cpu backend"
    source.requires_grad_()
    guidance.requires_grad_()
    result = run()
    assert relative_error(result.detach(), golden.map("jbu_stage/output")) <= TOLERANCE, "output"
    torch.autograd.backward(result, golden.map("jbu_stage/grad_output"))
    for name, tensor in (("source", source), ("guidance", guidance)):
        assert tensor.grad is not None
        assert relative_error(tensor.grad, golden.map(f"jbu_stage/grad_{name}")) <= TOLERANCE, f"gradient of {name}"
    theirs = golden.state("jbu_stage", "grads")
    layers = {
        "range_in": "range_proj.0",
        "range_out": "range_proj.3",
        "fixup_in": "fixup_proj.0",
        "fixup_out": "fixup_proj.3",
    }
    parameters = dict(jbu.stages[0].named_parameters())
    assert len(parameters) == len(theirs)
    for name, parameter in parameters.items():
        layer, _, leaf = name.rpartition(".")
        expected = theirs[f"{layers[layer]}.{leaf}" if layer else name]
        assert parameter.grad is not None
        assert relative_error(parameter.grad, expected.view_as(parameter)) <= TOLERANCE, f"gradient of {name}"


@pytest.mark.parametrize("start", [(2.0, 0.1), (1.0, 0.2)])
def test_a_jbu_with_the_distance_kernel_starts_as_a_bilateral_filter(start: tuple[float, float]) -> None:
    jbu = create_trainable("jbu", 6, "distance", start).eval()
    features, guidance = random(1, 5, 7, 6), picture(1, 37, 50, 3)
    with torch.no_grad():
        found, wanted = jbu(features, guidance, (37, 50)), Bilateral(*start)(features, guidance, (37, 50))
    assert (found - wanted).abs().max() < 1e-5
    paper = create_trainable("jbu", 6, "projection").eval()
    with torch.no_grad():
        assert (paper(features, guidance, (37, 50)) - wanted).abs().max() > 1e-2


def keyed_jbu(coarse_stages: int, start_feature: float = 0.4) -> JBU:
    jbu = JBU(6, kernel="distance", feature_keys=2, coarse_stages=coarse_stages, start_feature=start_feature)
    jbu.set_feature_keys(torch.eye(2, 6), torch.tensor([3.0, 1.0]))
    return jbu.eval().requires_grad_(False)


@pytest.mark.parametrize("coarse_stages", [0, 2])
def test_keys_of_the_features_keep_their_edges_where_the_image_has_none(coarse_stages: int) -> None:
    features = random(1, 4, 6, 6) * 0.01
    features[:, :, 3:, 0] += 4
    grey = torch.full((1, 32, 48, 3), 0.5)
    sharp, blunt = (keyed_jbu(coarse_stages, sigma)(features, grey, (32, 48))[0, :, :, 0] for sigma in (0.2, 1e4))
    # On the tokens' own positions a step stays a step with keys, and is smoothed away without.
    step = [map[:, 28].mean() - map[:, 19].mean() for map in (sharp, blunt)]
    assert step[0] > 3.5 > step[1] + 0.3


@pytest.mark.parametrize("coarse_stages", [0, 1])
def test_keys_are_those_of_the_features_before_a_projection(coarse_stages: int) -> None:
    jbu = keyed_jbu(coarse_stages)
    features, guidance = random(2, 4, 5, 6), picture(2, 32, 40, 3)
    chosen = ChannelMap(torch.eye(6)[3:5], torch.tensor([1.0, -1.0]))
    for size in ((32, 40), (4, 5)):
        whole = jbu(features, guidance, size)
        assert torch.allclose(jbu(features, guidance, size, chosen), whole[..., 3:5] + chosen.bias, atol=1e-5)
        banded = keyed_jbu(coarse_stages)
        banded.tile_pixels = 40
        assert torch.equal(banded(features, guidance, size), whole)
    assert (jbu(features, guidance, (4, 5)) != features).any() == (coarse_stages > 0)


def test_stages_at_the_features_own_size_keep_their_lengths() -> None:
    """Means of what points elsewhere stay as long as what they are the means of, in all channels together."""
    features, guidance = random(1, 6, 8, 6), picture(1, 48, 64, 3)
    unit = features / features.norm(dim=-1, keepdim=True)
    smoothed = keyed_jbu(2, 1e4)(unit, guidance, (6, 8))
    assert torch.allclose(smoothed.norm(dim=-1), torch.ones(1, 6, 8), atol=1e-5)
    # It is smoothed all the same: neighbours point the same way as they did not before.
    alike = [(maps[:, :, 1:] * maps[:, :, :-1]).sum(-1).mean() for maps in (unit, smoothed)]
    assert alike[1] > alike[0] + 0.3
    # Of different lengths the weighted mean: between the shortest and the longest, and doubled with them.
    found = keyed_jbu(1, 1e4)(features, guidance, (6, 8)).norm(dim=-1)
    lengths = features.norm(dim=-1)
    assert lengths.min() < found.min() < found.max() < lengths.max()
    doubled = keyed_jbu(1, 1e4)(2 * features, guidance, (6, 8)).norm(dim=-1)
    assert torch.allclose(doubled, 2 * found, rtol=1e-4)
    nothing = keyed_jbu(1)(torch.zeros(1, 6, 8, 6), guidance, (6, 8))
    assert torch.equal(nothing, torch.zeros(1, 6, 8, 6))


def test_a_steeper_cubic_is_sharper() -> None:
    """On a grey image a step is smoothed by every stage, and less so the more what goes into it overshoots."""
    features = torch.zeros(1, 6, 6, 1)
    features[:, :, 3:] = 1
    grey = torch.full((1, 48, 48, 3), 0.5)
    slopes = []
    for a in (-0.75, -2.0):
        jbu = JBU(1, kernel="distance", bicubic_a=a).eval().requires_grad_(False)
        slopes.append(float(jbu(features, grey, (48, 48))[0, 24, :, 0].diff().max()))
    assert slopes[1] > 1.1 * slopes[0]


def test_keys_that_cannot_be() -> None:
    with pytest.raises(GeometryError, match="only the distance kernel"):
        JBU(6, feature_keys=2)
    with pytest.raises(GeometryError, match="feature_keys=7"):
        JBU(6, kernel="distance", feature_keys=7)
    with pytest.raises(GeometryError, match="start_coarse"):
        JBU(6, kernel="distance", coarse_stages=1, start_coarse=0.0)
    with pytest.raises(GeometryError, match=r"\[2, 6\], got \[3, 6\]"):
        keyed_jbu(0).set_feature_keys(torch.eye(3, 6), torch.ones(3))


@pytest.mark.parametrize("grad", [False, True])
def test_no_images_give_no_maps(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        found = Bilateral()(torch.empty(0, 2, 3, 5), torch.empty(0, 32, 48, 3), (32, 48))
    assert found.shape == (0, 32, 48, 5)

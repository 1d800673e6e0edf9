"""The protocol that all upsamplers share: sizes, projections, row tiles, memory and errors."""

from pathlib import Path

import pytest
import torch

from featup.checkpoints import upsampler_bytes
from featup.errors import GeometryError
from featup.upsamplers import Bilateral, ChannelMap, Upsampler, create_upsampler
from featup.upsamplers.joint import JointUpsampler
from tests.featup.support import CHANNELS, TOLERANCE, LargestTensor, picture, random, relative_error
from tests.featup.upsamplers.support import random_jbu


def create(name: str) -> Upsampler:
    if name == "jbu":
        return random_jbu().requires_grad_(False)
    return create_upsampler(name, channels=CHANNELS)  # type: ignore[arg-type]


NAMES = ["nearest", "bilinear", "bicubic", "norm_bilinear", "guided_filter", "bilateral", "jbu"]
every_upsampler = pytest.mark.parametrize("name", NAMES)
joint_upsampler = pytest.mark.parametrize("name", ["bilateral", "jbu"])


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
    result = create(name)(features, picture(1, *guidance, 3), size)
    assert result.shape == (1, *size, CHANNELS)
    assert result.isfinite().all()
    assert torch.equal(features, before), "the caller's features were written to"


@every_upsampler
def test_uint8_and_float_guidance_are_one_image(name: str) -> None:
    features, image = random(1, 4, 5, CHANNELS), picture(1, 29, 37, 3)
    upsampler = create(name)
    assert torch.equal(upsampler(features, image, (25, 33)), upsampler(features, image.float() / 255, (25, 33)))


@joint_upsampler
def test_row_tiles_change_nothing(name: str) -> None:
    features, image = random(1, 5, 4, CHANNELS), picture(1, 37, 31, 3)
    upsampler = create(name)
    assert isinstance(upsampler, JointUpsampler)
    whole = upsampler(features, image, (37, 31))
    for tile_pixels in (1, 31 * 5, 31 * 36):
        upsampler.tile_pixels = tile_pixels
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                tiled = upsampler(features, image, (37, 31))
            # The learned kernel's matrix products may round by the number of pixels, depending on the processor.
            limit = 0.0 if name == "bilateral" else 1e-6
            assert relative_error(tiled, whole) <= limit, f"tile_pixels={tile_pixels}, gradients {grad}"


@every_upsampler
@pytest.mark.parametrize("projected", [False, True], ids=["all-channels", "projected"])
@pytest.mark.parametrize("low", [(1, 1), (3, 5), (7, 9)], ids=str)
def test_an_image_does_not_depend_on_its_batch(name: str, low: tuple[int, int], projected: bool) -> None:
    """Bug: mixing the channels of the whole batch at once rounded by the batch's size."""
    size = (low[0] * 3, low[1] * 2)
    features, image = random(5, *low, CHANNELS), picture(5, *size, 3)
    projection = ChannelMap(random(1, CHANNELS), random(1)) if projected else None
    upsampler = create(name)
    together = upsampler(features, image, size, projection)
    for index in range(5):
        image_slice = slice(index, index + 1)
        # Copies, because another address must not make a difference either.
        separate = upsampler(features[image_slice].clone(), image[image_slice].clone(), size, projection)
        assert torch.equal(separate, together[image_slice]), f"image {index}"


@pytest.mark.parametrize("channels", [64, 67])
@pytest.mark.parametrize("outputs", [1, 24])
def test_wide_projections_do_not_depend_on_the_batch(channels: int, outputs: int) -> None:
    """The same at widths where the product runs in blocks."""
    jbu = random_jbu(channels, stages=1).requires_grad_(False)
    projection = ChannelMap(random(outputs, channels), random(outputs))
    features, image = random(4, 3, 5, channels), picture(4, 6, 10, 3)
    together = jbu(features, image, (6, 10), projection)
    apart = [jbu(features[i : i + 1].clone(), image[i : i + 1].clone(), (6, 10), projection) for i in range(4)]
    assert torch.equal(torch.cat(apart), together)


@every_upsampler
@pytest.mark.parametrize("outputs", [2, 9], ids=["fewer", "more"])
def test_projection_equals_projecting_afterwards(name: str, outputs: int) -> None:
    features, image = random(2, 4, 5, CHANNELS), picture(2, 26, 31, 3)
    projection = ChannelMap(random(outputs, CHANNELS), 3 + random(outputs))
    upsampler = create(name)
    afterwards = upsampler(features, image, (26, 31)) @ projection.weight.T + projection.bias
    assert relative_error(upsampler(features, image, (26, 31), projection), afterwards) <= TOLERANCE


@every_upsampler
def test_out_in_half_precision(name: str) -> None:
    features, image = random(3, 4, 5, CHANNELS), picture(3, 20, 31, 3)
    projection = ChannelMap(random(2, CHANNELS), random(2))
    upsampler = create(name)
    out = torch.full((3, 20, 31, 2), torch.nan, dtype=torch.float16)
    assert upsampler(features, image, (20, 31), projection, out) is out
    assert torch.equal(out, upsampler(features, image, (20, 31), projection).half())


@every_upsampler
def test_inference_mode_gives_the_same(name: str) -> None:
    features, image = random(2, 4, 5, CHANNELS), picture(2, 20, 31, 3)
    upsampler = create(name)
    with torch.inference_mode():
        inferred = upsampler(features, image, (20, 31))
    assert relative_error(inferred, upsampler(features, image, (20, 31))) <= TOLERANCE


@every_upsampler
def test_gradients_reach_the_features(name: str) -> None:
    """Against the adjoint: for a linear operator, <U x, y> is linear in x, with the gradient as its coefficients."""
    features = random(1, 3, 4, CHANNELS).requires_grad_()
    image, weights = picture(1, 11, 13, 3), random(1, 11, 13, CHANNELS)
    upsampler = create(name)
    zero = upsampler(torch.zeros_like(features), image, (11, 13)).detach()
    value = ((upsampler(features, image, (11, 13)) - zero) * weights).sum()
    value.backward()
    assert features.grad is not None
    assert relative_error((features.grad * features.detach()).sum(), value.detach()) <= 1e-4


@joint_upsampler
def test_memory_is_bounded_by_the_tile(name: str) -> None:
    features, image = random(1, 256, 256, 8), picture(1, 512, 512, 3)
    upsampler = Bilateral() if name == "bilateral" else random_jbu(8).requires_grad_(False)
    upsampler.tile_pixels = 4096
    with torch.no_grad(), LargestTensor() as largest:
        upsampler(features, image, (512, 512))
    assert largest.elements <= 512 * 512 * 8, "something larger than the result was allocated"


# The guided filter holds the coefficients of four channels for each of the result's.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "guided_filter"])
def test_a_given_out_is_the_only_whole_result(name: str) -> None:
    """The largest other tensor is the image with the border that the windows read."""
    features, image = random(1, 40, 40, CHANNELS), picture(1, 160, 160, 3)
    upsampler = create(name)
    if isinstance(upsampler, JointUpsampler):
        upsampler.tile_pixels = 160
    out = torch.empty(1, 160, 160, CHANNELS, dtype=torch.float16)
    with torch.no_grad(), LargestTensor(out) as largest:
        upsampler(features, image, (160, 160), out=out)
    assert 0 < largest.elements <= 166 * 166 * 3


@every_upsampler
def test_row_tiles_are_new_tensors_and_cover_the_map(name: str) -> None:
    upsampler = create(name)
    if isinstance(upsampler, JointUpsampler):
        upsampler.tile_pixels = 40
    for size in ((4, 5), (13, 10)):
        features, image = random(1, 4, 5, CHANNELS), picture(1, 13, 10, 3)
        tiles = list(upsampler.row_tiles(features, image, size))
        rows = [row for part, _ in tiles for row in range(part.start, part.stop)]
        assert rows == list(range(size[0]))
        addresses = {features.data_ptr()} | {tile.data_ptr() for _, tile in tiles}
        assert len(addresses) == 1 + len(tiles), f"{size}: adding the bias would write to somebody else's tensor"


def test_the_memory_test_sees_what_it_looks_for() -> None:
    upsampler = Bilateral(tile_pixels=128 * 128)
    with torch.no_grad(), LargestTensor() as largest:
        upsampler(random(1, 64, 64, 8), picture(1, 128, 128, 3), (128, 128))
    assert largest.elements == 128 * 128 * 49


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
        create(name)(random(*features), torch.rand(guidance), (8, 10))


@every_upsampler
@pytest.mark.parametrize(
    "shape", [(2, 8, 10, CHANNELS), (1, 8, 10, 1), (1, 1, 10, CHANNELS), (8, 10, CHANNELS)], ids=str
)
def test_out_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    """Bug: whatever the result could be broadcast to was taken, and rows beyond the batch were left as they were."""
    with pytest.raises(GeometryError, match=rf"{name}: out must be \[1, 8, 10, {CHANNELS}\], got"):
        create(name)(random(1, 4, 5, CHANNELS), picture(1, 8, 10, 3), (8, 10), out=torch.zeros(shape))


@every_upsampler
def test_projection_of_other_features(name: str) -> None:
    with pytest.raises(GeometryError, match=rf"{name}: a projection of 4 channels cannot take features of {CHANNELS}"):
        create(name)(random(1, 4, 5, CHANNELS), picture(1, 8, 10, 3), (8, 10), ChannelMap(random(2, 4), random(2)))


def test_create_upsampler(tmp_path: Path) -> None:
    (tmp_path / "jbu.safetensors").write_bytes(upsampler_bytes(random_jbu()))
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


@pytest.mark.parametrize("grad", [False, True])
def test_no_images_give_no_maps(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        found = Bilateral()(torch.empty(0, 2, 3, 5), torch.empty(0, 32, 48, 3), (32, 48))
    assert found.shape == (0, 32, 48, 5)

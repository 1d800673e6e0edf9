"""Views against the original's values, and against padding, interpolation and cropping done one after the other."""

from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.multiview.views import Jitter, View, reflect, to_image, to_view, warp
from tests.featup.support import TOLERANCE, random, relative_error

SIZE = (23, 31)
PAD = 7

VIEWS = {
    "identity": View(1.0, PAD, PAD, False),
    "shifted": View(1.0, 0, 2 * PAD, False),
    "flipped": View(1.0, 3, 1, True),
    "zoomed": View(1.37, 11, 20, False),
    "zoomed-flipped": View(1.8, 40, 2, True),
    "corner": View(1.8, 0, 50, False),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())


def step_by_step(image: Tensor, view: View, max_pad: int) -> Tensor:
    """``[1, H, W, C]`` padded, zoomed, cropped and flipped by torch."""
    _, height, width, _ = image.shape
    planes = functional.pad(image.permute(0, 3, 1, 2), [max_pad] * 4, mode="reflect")
    if view.zoom > 1:
        planes = functional.interpolate(planes, scale_factor=view.zoom, mode="bilinear")
    planes = planes[:, :, view.top : view.top + height, view.left : view.left + width]
    return (planes.flip(3) if view.flip else planes).permute(0, 2, 3, 1)


def ramp(size: tuple[int, int]) -> Tensor:
    """``[1, H, W, 2]``: every pixel holds its own row and column."""
    return torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float32) for s in size), indexing="ij"), -1)[None]


# Drawing


@pytest.mark.parametrize("size", [(48, 48), SIZE, (5, 90), (1, 1)], ids=["square", "odd", "flat", "one-pixel"])
def test_every_drawn_view_fits(size: tuple[int, int]) -> None:
    jitter = Jitter(max_pad=4, zoom=(1.0, 1.8))
    for view in jitter.sample(200, size, torch.Generator().manual_seed(0)):
        for side, offset in zip(size, (view.top, view.left), strict=True):
            assert 0 <= offset <= floor((side + 8) * view.zoom) - side
        assert 1 <= view.zoom <= 1.8


def test_draws_reach_the_whole_range() -> None:
    views = Jitter(max_pad=3, zoom=(1.0, 1.0)).sample(500, (10, 40), torch.Generator().manual_seed(0))
    assert {v.top for v in views} == set(range(7))
    assert {v.left for v in views} == set(range(7))
    assert 200 < sum(v.flip for v in views) < 300
    zooms = [v.zoom for v in Jitter(zoom=(1.2, 1.6)).sample(500, SIZE, torch.Generator().manual_seed(0))]
    assert min(zooms) < 1.21
    assert max(zooms) > 1.59
    assert min(zooms) >= 1.2


def test_a_share_of_the_views_is_zoomed_and_the_rest_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    zooms = [v.zoom for v in Jitter(zoom=(1.2, 1.6), zoom_share=0.25).sample(1000, SIZE, generator)]
    zoomed = [zoom for zoom in zooms if zoom != 1]
    assert 200 < len(zoomed) < 300
    assert 1.2 <= min(zoomed) < 1.22
    assert 1.58 < max(zoomed) <= 1.6
    assert {v.zoom for v in Jitter(zoom_share=0.0).sample(20, SIZE, generator)} == {1.0}


def test_a_seed_decides_and_nothing_else() -> None:
    jitter = Jitter()
    torch.manual_seed(1)
    first = jitter.sample(5, SIZE, torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = jitter.sample(5, SIZE, torch.Generator().manual_seed(3))
    assert first == again
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert first != jitter.sample(5, SIZE, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(3)
    assert jitter.sample(2, SIZE, generator) + jitter.sample(3, SIZE, generator) == first


def test_options_leave_the_other_draws_alone() -> None:
    plain = Jitter().sample(5, SIZE, torch.Generator().manual_seed(0))
    unflipped = Jitter(flip=False).sample(5, SIZE, torch.Generator().manual_seed(0))
    assert [(v.zoom, v.top, v.left, False) for v in plain] == [(v.zoom, v.top, v.left, v.flip) for v in unflipped]
    assert any(v.flip for v in plain)
    assert Jitter().sample(5, SIZE, torch.Generator().manual_seed(0), identity_first=True)[1:] == plain[1:]


def test_the_identity_changes_nothing() -> None:
    jitter = Jitter(max_pad=PAD)
    (view,) = jitter.sample(1, SIZE, torch.Generator().manual_seed(0), identity_first=True)
    image = random(1, *SIZE, 3)
    assert torch.equal(warp(image, [view], PAD), image)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_pad": -1}, "max_pad=-1"),
        ({"zoom": (0.9, 1.5)}, "at least 1"),
        ({"zoom": (1.5, 1.2)}, r"\(1.5, 1.2\)"),
        ({"zoom": (1.0, float("inf"))}, "finite"),
        ({"zoom": (float("nan"), 2.0)}, "finite"),
    ],
)
def test_impossible_jitters_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(GeometryError, match=text):
        Jitter(**options)  # type: ignore[arg-type]


def test_impossible_views_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"zoom=0.5"):
        View(0.5, 0, 0, False)
    with pytest.raises(GeometryError, match=r"\(-1, 0\)"):
        View(1.0, -1, 0, False)
    with pytest.raises(GeometryError, match="top is at most 14"):
        warp(random(1, *SIZE, 3), [View(1.0, 15, 0, False)], PAD)
    with pytest.raises(GeometryError, match="left at most 14"):
        to_image(View(1.0, 0, 15, False), torch.zeros(2), SIZE, PAD)
    with pytest.raises(GeometryError, match="one view for each"):
        warp(random(2, *SIZE, 3), [VIEWS["zoomed"]], PAD)
    with pytest.raises(GeometryError, match="uint8"):
        warp(torch.zeros(1, *SIZE, 3, dtype=torch.uint8), [VIEWS["zoomed"]], PAD)
    with pytest.raises(GeometryError, match="row, column"):
        to_view(VIEWS["zoomed"], torch.zeros(3), SIZE, PAD)
    with pytest.raises(GeometryError, match="-1 views"):
        Jitter().sample(-1, SIZE, torch.Generator())


# Warping


@pytest.mark.parametrize("case", range(6))
def test_equals_the_original(shared: Path, case: int) -> None:
    with np.load(shared / "golden" / "featup_reference.npz") as values:
        image = torch.from_numpy(values["jitter/image"]).permute(0, 2, 3, 1)
        expected = torch.from_numpy(values[f"jitter/{case}/output"]).permute(0, 2, 3, 1)
        # The original calls the offset of the rows x.
        zoom, top, left, flip = (values[f"jitter/{case}/{name}"].item() for name in ("zoom", "x", "y", "flip"))
        max_pad = int(values["jitter/max_pad"])
    assert relative_error(warp(image, [View(zoom, top, left, flip)], max_pad), expected) < TOLERANCE


@every_view
def test_equals_padding_zoom_crop_and_flip(view: View) -> None:
    image = random(1, *SIZE, 3)
    assert relative_error(warp(image, [view], PAD), step_by_step(image, view, PAD)) < TOLERANCE


def test_without_a_border() -> None:
    image = random(1, *SIZE, 3)
    view = View(1.5, 11, 0, True)
    assert relative_error(warp(image, [view], 0), step_by_step(image, view, 0)) < TOLERANCE


def test_every_map_gets_its_own_view() -> None:
    images = random(len(VIEWS), *SIZE, 3)
    together = warp(images, list(VIEWS.values()), PAD)
    for index, view in enumerate(VIEWS.values()):
        assert torch.equal(together[index : index + 1], warp(images[index : index + 1], [view], PAD))
    assert warp(images[:0], [], PAD).shape == (0, *SIZE, 3)


def test_a_border_wider_than_the_image_goes_back_and_forth() -> None:
    column = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
    seen = warp(column.expand(1, 3, 2, 1), [View(1.0, 0, 9, False)], 9)
    # Rows -9, -8 and -7 of a signal of period 4.
    assert seen[0, :, 0, 0].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("backend_gradient", [False, True], ids=["plain", "with-gradient"])
def test_the_gradient_does_not_change_the_values(backend_gradient: bool) -> None:
    image = random(1, *SIZE, 3).requires_grad_(backend_gradient)
    view = VIEWS["zoomed-flipped"]
    found = warp(image, [view], PAD)
    assert relative_error(found.detach(), step_by_step(image.detach(), view, PAD)) < TOLERANCE
    if backend_gradient:
        weight = random(1, *SIZE, 3, seed=1)
        (gradient,) = torch.autograd.grad((found * weight).sum(), image)
        (expected,) = torch.autograd.grad((step_by_step(image, view, PAD) * weight).sum(), image)
        assert relative_error(gradient, expected) < TOLERANCE


@pytest.mark.parametrize("size", [None, (3, 4)], ids=["same-size", "other-size"])
def test_gradcheck(size: tuple[int, int] | None) -> None:
    maps = random(2, 5, 4, 2, dtype=torch.float64).requires_grad_()
    views = [View(1.3, 1, 4, True), View(1.0, 0, 2, False)]
    assert torch.autograd.gradcheck(lambda m: warp(m, views, 2, size), (maps,), fast_mode=False)


@every_view
def test_a_smaller_map_shows_the_same_place(view: View) -> None:
    """A map of half the resolution, each cell holding its centre's position in the image."""
    size = (24, 32)
    half = torch.nn.functional.avg_pool2d(ramp(size).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    seen = warp(half, [view], PAD, image_size=size)
    assert seen.shape == half.shape
    at = ramp((12, 16))[0] * 2 + 0.5
    expected = to_image(view, at, size, PAD)
    # Beyond the centres of the outermost cells there is nothing to interpolate with.
    last = torch.tensor([s - 1.5 for s in size])
    expected = expected.clamp(min=0.5).minimum(last)
    assert relative_error(seen[0], expected) < TOLERANCE


def test_a_result_of_another_size_covers_the_same_view() -> None:
    size = (24, 32)
    view = View(1.5, 15, 18, True)  # nothing of the border, so that the ramp stays one
    whole = warp(ramp(size), [view], PAD)
    half = warp(ramp(size), [view], PAD, size=(12, 16))
    average = functional.avg_pool2d(whole.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert relative_error(half, average) < TOLERANCE


# Positions


@every_view
def test_positions_agree_with_warp(view: View) -> None:
    """On an image that holds its own coordinates a view shows where each of its pixels comes from."""
    seen = warp(ramp(SIZE), [view], PAD)[0]
    assert float((seen - to_image(view, ramp(SIZE)[0], SIZE, PAD)).abs().max()) < TOLERANCE * max(SIZE)


@every_view
def test_there_and_back(view: View) -> None:
    image_positions = ramp(SIZE)[0].double() + 0.25
    image_positions = image_positions.minimum(torch.tensor(SIZE).double() - 1)
    seen, inside = to_view(view, image_positions, SIZE, PAD)
    assert inside.any()
    back = to_image(view, seen[inside], SIZE, PAD)
    torch.testing.assert_close(back, image_positions[inside], atol=1e-9, rtol=0)


def test_what_is_inside() -> None:
    # Zoomed by 2 from (4, 6): view row r shows padded row (r + 4.5) / 2 - 0.5, so rows 1.75 - PAD on.
    view = View(2.0, 2 * PAD + 4, 2 * PAD + 6, False)
    size = (20, 30)
    positions = torch.tensor([[2.0, 3.0], [1.5, 3.0], [1.49, 3.0], [11.49, 17.49], [11.5, 17.0], [5.0, 17.5]])
    seen, inside = to_view(view, positions, size, PAD)
    assert inside.tolist() == [True, True, False, True, False, False]
    torch.testing.assert_close(seen[0], torch.tensor([0.5, 0.5]))
    mirrored, same = to_view(View(2.0, view.top, view.left, True), positions[:4], size, PAD)
    torch.testing.assert_close(mirrored[:, 1], 29 - seen[:4, 1])
    assert same.tolist() == [True, True, False, True]


def test_positions_are_differentiable() -> None:
    positions = (random(6, 2, dtype=torch.float64) * 2 + 10).requires_grad_()
    view = VIEWS["zoomed-flipped"]
    assert torch.autograd.gradcheck(lambda p: to_image(view, p, SIZE, PAD), (positions,))
    assert torch.autograd.gradcheck(lambda p: to_view(view, p, SIZE, PAD)[0], (positions,))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_reflection_equals_numpy(size: int) -> None:
    axis = np.arange(size)
    expected = np.pad(axis, 13, mode="reflect") if size > 1 else np.zeros(27, dtype=int)
    found = reflect(torch.arange(-13, size + 13), size)
    assert found.tolist() == expected.tolist()
    assert found.dtype == torch.int64


def test_reflection_of_fractions() -> None:
    assert reflect(torch.tensor([-0.25, 0.5, 3.5, 4.0, 4.25, 8.5]), 5).tolist() == [0.25, 0.5, 3.5, 4.0, 3.75, 0.5]

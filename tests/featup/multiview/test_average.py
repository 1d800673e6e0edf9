"""Multi-view averages cell by cell, and the method on real images with a real (random) backbone."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.images import resize_images
from featup.kernels.resample import interpolation_taps, resample
from featup.multiview import average as average_module
from featup.multiview.average import MultiView, MultiViewField, MultiViewOptions, average_views
from featup.multiview.back_projection import blend_weight, view_consistency
from featup.multiview.view_features import image_generator, view_features
from featup.multiview.views import Jitter, View, to_view
from featup.projection import PCAFit
from featup.upsamplers import AnyUp, Bilateral, Interpolate, Upsampler
from featup.upsamplers.base import norm_preserving_mean
from tests.featup.multiview.photographs import SIZE as IMAGE_SIZE
from tests.featup.support import TOLERANCE, random, relative_error

SIZE = (23, 31)
PAD = 7
VIEWS = [View(1.0, PAD, PAD, False), View(1.0, 3, 1, True), View(1.8, 40, 2, True), View(1.0, 0, 2 * PAD, False)]
OPTIONS = MultiViewOptions(views=10, held_out=3, max_pad=8)


def ramp(size: tuple[int, int]) -> Tensor:
    """``[1, H, W, 2]``: every pixel holds its own row and column."""
    return torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float32) for s in size), indexing="ij"), -1)[None]


def test_the_average_is_the_weighted_mean_of_the_cells_nearby() -> None:
    """Cell by cell, at the positions of the image's cell centres in each view."""
    size, grid, sigma = (24, 32), (6, 4), 0.3
    views = [*VIEWS]
    maps = random(len(views), *grid, 3)
    step = torch.tensor([size[0] / grid[0], size[1] / grid[1]])
    centres = (ramp(grid)[0] + 0.5) * step - 0.5
    total, weight = torch.zeros(*grid, 3), torch.zeros(*grid, 1)
    for cells, view in zip(maps, views, strict=True):
        at, inside = to_view(view, centres, size, PAD)
        place = (at + 0.5) / step - 0.5
        for y in range(grid[0]):
            for x in range(grid[1]):
                distance = (place - torch.tensor([y, x])).abs()
                near = inside & (distance < 1).all(-1)
                share = torch.exp(-distance.square().sum(-1) / (2 * sigma**2)) * near
                total += share[..., None] * cells[y, x]
                weight += share[..., None]
    assert relative_error(average_views(maps, views, PAD, size, sigma), total / weight) < TOLERANCE


def test_the_average_of_constant_views_is_the_constant() -> None:
    jitter = Jitter(max_pad=PAD, zoom=(1.0, 1.4))
    views = [jitter.identity, *jitter.sample(5, SIZE, torch.Generator().manual_seed(3))]
    average = average_views(torch.full((6, 5, 4, 2), 3.0), views, PAD, SIZE, 0.2)
    assert torch.allclose(average, torch.full((5, 4, 2), 3.0))


def test_the_average_ignores_reflections() -> None:
    """The first cells of a view that is shifted by the whole pad are reflections, and must not count."""
    view = View(1.0, 0, PAD, False)
    maps = torch.zeros(2, 5, 4, 1)
    maps[1, 0] = 100
    average = average_views(maps, [View(1.0, PAD, PAD, False), view], 7, (35, 28), 0.2)
    assert float(average.abs().max()) == 0


@pytest.mark.parametrize(
    "arguments",
    [(torch.zeros(2, 3, 3, 1), 0.2), (torch.zeros(3, 3, 1), 0.2), (torch.zeros(1, 3, 3, 1), 0.0)],
    ids=["maps", "dimensions", "sigma"],
)
def test_averages_of_maps_that_do_not_fit(arguments: tuple[Tensor, float]) -> None:
    with pytest.raises(GeometryError, match="one view for each and a positive sigma"):
        average_views(arguments[0], VIEWS[:1], PAD, SIZE, arguments[1])


def single(features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    return features[:1], images[:1]


def averaged(backbone: Backbone, features: Tensor, image: Tensor, options: MultiViewOptions) -> tuple[Tensor, Tensor]:
    """The average of an image's training views, and the norm-preserving one, ``[1, h, w, C]`` each."""
    views = options.jitter.sample(options.views, IMAGE_SIZE, image_generator(options.seed, image))
    views = views[: options.training_views]
    maps = torch.cat([features, view_features(backbone, image, views, options.max_pad)])
    average = partial(
        average_views,
        views=[options.jitter.identity, *views],
        max_pad=options.max_pad,
        image_size=IMAGE_SIZE,
        sigma=options.sigma,
    )
    return average(maps)[None], norm_preserving_mean(average, maps)[None]


@pytest.mark.parametrize("views", [1, 4, 16])
def test_without_back_projection_it_is_the_base_of_the_average(
    backbone: Backbone, features: Tensor, images: Tensor, views: int
) -> None:
    options = replace(OPTIONS, views=views, back_project=False)
    feature, image = single(features, images)
    found = MultiView(backbone, Bilateral(), options)(feature, image, IMAGE_SIZE)
    _, rescaled = averaged(backbone, feature, image, options)
    assert torch.allclose(found, Bilateral()(rescaled, image, IMAGE_SIZE), atol=1e-4)
    assert not torch.allclose(found, Bilateral()(feature, image, IMAGE_SIZE), atol=1e-2)


class Grey(Upsampler):
    """The mean feature everywhere: the worst map."""

    name = "grey"

    def row_tiles(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, size[0]), features.mean((1, 2), keepdim=True).expand(-1, *size, -1).clone()


@pytest.mark.parametrize("size", [IMAGE_SIZE, (128, 96)], ids=["the image's", "larger"])
def test_the_residual_of_the_patch_means_is_upsampled_and_added(
    backbone: Backbone, features: Tensor, images: Tensor, size: tuple[int, int]
) -> None:
    feature, image = single(features, images)
    options = replace(OPTIONS, margin=0.5)
    (field,) = MultiView(backbone, Grey(), options).fields(feature, image)
    average, rescaled = averaged(backbone, feature, image, options)
    initial = Grey()(rescaled, image, size)
    residual = average - initial.view(1, 4, size[0] // 4, 3, size[1] // 3, -1).mean((2, 4))
    down, across = (
        interpolation_taps("bicubic", low, high, bicubic_a=-2.0) for low, high in zip((4, 3), size, strict=True)
    )
    added = resample(residual, down, across)
    assert isinstance(field, MultiViewField)
    weight = field.blend_weight
    assert 0.05 < weight <= 1
    assert added.abs().max() > 0.1
    assert torch.allclose(field.query(size), (initial + weight * added)[0], atol=1e-4)


def test_back_projection_explains_more_of_held_out_views(backbone: Backbone, features: Tensor, images: Tensor) -> None:
    options = replace(OPTIONS, views=80, held_out=40, margin=0.5)
    explained = []
    for on in (False, True):
        multiview = MultiView(backbone, Grey(), replace(options, back_project=on))
        explained.append([field.explained_variance or 0.0 for field in multiview.fields(features, images)])
    assert all(after > before + 0.02 for before, after in zip(*explained, strict=True))


def test_the_quality_is_that_of_held_out_views_on_random_directions(
    backbone: Backbone, features: Tensor, images: Tensor
) -> None:
    """Computed again from all channels: as many directions as channels are a rotation."""
    options = replace(OPTIONS, directions=features.shape[-1])
    feature, image = single(features, images)
    (field,) = MultiView(backbone, Bilateral(), options).fields(feature, image)
    views = options.jitter.sample(13, IMAGE_SIZE, image_generator(options.seed, image))[10:]
    targets = view_features(backbone, image, views, options.max_pad)
    bilinear = Interpolate("bilinear")(feature, image, IMAGE_SIZE)[0]
    for explained, maps in (
        (field.explained_variance, field.query(IMAGE_SIZE)),
        (field.baseline_explained_variance, bilinear),
    ):
        assert explained == pytest.approx(float(view_consistency(maps, views, targets, options.jitter)), abs=1e-4)
    (unmeasured,) = MultiView(backbone, Bilateral(), replace(options, held_out=0)).fields(feature, image)
    assert unmeasured.explained_variance is None
    assert torch.equal(unmeasured.query(IMAGE_SIZE), field.query(IMAGE_SIZE)), "held-out views change the features"


@pytest.mark.parametrize("base", [Bilateral(), Grey(), AnyUp(width=32)], ids=lambda base: base.name)
def test_features_projected_after_are_those_projected_before(
    backbone: Backbone, features: Tensor, images: Tensor, base: Upsampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = features.shape[-1]
    fit = PCAFit(channels)
    fit.add(features)
    pca = fit.solve(6)
    multiview = MultiView(backbone, base.eval(), replace(OPTIONS, margin=0.5))
    everything = multiview(features, images, IMAGE_SIZE)
    projected = multiview(features, images, IMAGE_SIZE, pca.as_channel_map())
    assert relative_error(projected, pca.project(everything)) < 1e-4
    for out in (torch.empty_like(projected), torch.empty_like(projected, dtype=torch.float16)):
        multiview(features, images, IMAGE_SIZE, pca.as_channel_map(), out)
        assert torch.equal(out, projected.to(out.dtype))
    # The last part is smaller.
    monkeypatch.setattr(average_module, "_PART_BYTES", 4 * IMAGE_SIZE[0] * IMAGE_SIZE[1] * 4)
    assert torch.allclose(multiview(features, images, IMAGE_SIZE, pca.as_channel_map()), projected, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch_mates(backbone: Backbone, features: Tensor, images: Tensor) -> None:
    multiview = MultiView(backbone, Bilateral(), OPTIONS)
    whole = multiview(features, images, IMAGE_SIZE)
    order = [2, 0]
    assert torch.equal(multiview(features[order], images[order], IMAGE_SIZE), whole[order])
    other = MultiView(backbone, Bilateral(), replace(OPTIONS, seed=1))(features[:1], images[:1], IMAGE_SIZE)
    assert not torch.equal(other, whole[:1])


def test_larger_guidance_is_viewed_at_the_backbones_size(backbone: Backbone, features: Tensor, images: Tensor) -> None:
    large = resize_images(images[:1], (128, 96))
    found = MultiView(backbone, Bilateral(), replace(OPTIONS, back_project=False)).fields(features[:1], large)[0]
    seen = resize_images(large, IMAGE_SIZE)
    _, rescaled = averaged(backbone, features[:1], seen, replace(OPTIONS, back_project=False))
    assert torch.allclose(found.query((128, 96)), Bilateral()(rescaled, large, (128, 96))[0], atol=1e-4)


def test_images_that_do_not_belong_to_the_features_are_refused(
    backbone: Backbone, features: Tensor, images: Tensor
) -> None:
    multiview = MultiView(backbone, Bilateral(), OPTIONS)
    for wrong in ((features, images.float()), (features[:2], images), (features[..., :3], images)):
        with pytest.raises(GeometryError, match=r"multiview: need uint8 images \[B, H, W, 3\] and their features"):
            multiview.fields(*wrong)


@given(st.integers(0, 2**32 - 1), st.floats(0, 3), st.floats(0, 3), st.sampled_from([0.0, 0.01, 0.5]))
def test_the_blend_weight_is_the_smallest_that_suffices(
    seed: int, initial_error: float, corrected_error: float, margin: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, *errors = torch.randn(4, 50, 3, generator=generator, dtype=torch.float64)
    initial, corrected = target + initial_error * errors[0], target + corrected_error * errors[1]
    baseline = target + errors[2]

    def error(weight: float) -> float:
        return float((target - torch.lerp(initial, corrected, weight)).square().sum())

    weight = blend_weight(margin, target, initial, corrected, baseline)
    goal = (1 - margin) * float((target - baseline).square().sum())
    assert 0 <= weight <= 1
    least = min(error(other) for other in np.linspace(0, 1, 101))
    assert error(weight) <= least + 1e-6 or error(weight) <= goal + 1e-6
    assert weight == 0 or all(error(other) > goal - 1e-6 for other in np.linspace(0, weight, 20)[:-1])

"""The implicit network against reference values, and fits of real images by a real (random) backbone."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from featup.backbones import Backbone, create_backbone
from featup.errors import GeometryError
from featup.kernels.resample import interpolation_taps, resample
from featup.multiview.back_projection import blend_weight, fit_patch_means, view_consistency
from featup.multiview.implicit import FitOptions, Implicit
from featup.multiview.network import ImplicitNetwork
from featup.multiview.sampling import image_generator
from featup.multiview.views import Jitter, View, average_views, warp
from featup.projection import PCA, PCAFit
from featup.upsamplers import JBU, Bilateral, ChannelMap, Interpolate, Upsampler, create_trainable
from featup.upsamplers.base import norm_preserving_mean

SIZE = (64, 48)
JITTER = Jitter(max_pad=8, zoom=(1.0, 1.0))
OPTIONS = FitOptions(
    steps=40, tokens=48, positions=8, views=10, held_out=3, jitter=JITTER, width=32, lr=5e-3, magnitude=0.02
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return create_backbone("test_vit", pretrained=False, stride=16, norm="layer", image_size=SIZE)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Blocks of colour that do not lie on the backbone's grid, each with a texture of its own."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(3, 3, 7, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="nearest")
    noise = torch.rand(3, 3, *SIZE, generator=generator) * 0.1
    return ((smooth * 0.9 + noise) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def features(backbone: Backbone, images: Tensor) -> Tensor:
    with torch.no_grad():
        coarse: Tensor = backbone(images)
    return coarse


@pytest.fixture(scope="module")
def pca(features: Tensor) -> PCA:
    fit = PCAFit(features.shape[-1])
    fit.add(features)
    return fit.solve(6)


def make(backbone: Backbone, pca: PCA, options: FitOptions = OPTIONS) -> Implicit:
    return Implicit(backbone, pca, Bilateral(), options)


@pytest.fixture(scope="module")
def fitted(backbone: Backbone, pca: PCA, features: Tensor, images: Tensor) -> Implicit:
    implicit = make(backbone, pca)
    implicit(features, images, SIZE, pca.as_channel_map())
    return implicit


def test_the_network_is_that_of_the_reference(shared: Path) -> None:
    with np.load(shared / "golden" / "featup_reference.npz") as values:
        found = {name.removeprefix("implicit/"): values[name] for name in values.files if name.startswith("implicit/")}
    state = {
        name.removeprefix("state_dict/"): torch.from_numpy(value)
        for name, value in found.items()
        if name.startswith("state_dict/")
    }
    image = torch.from_numpy(found["image"])
    count = int(found["n_freqs"])
    network = ImplicitNetwork(16, width=16, frequencies=count, highest=10.0)
    # In the reference's own precision: waves of 22 thousand radians leave no digits for another one to agree on.
    # The reference keeps one number for each input and frequency, in another order.
    loaded = {
        "biases": state["1.biases"].reshape(1, 2, count, 5),
        "scale_in": state["2.norm.weight"].view(1, 1, -1),
        "shift_in": state["2.norm.bias"].view(1, 1, -1),
        "scale_hidden": state["7.norm.weight"].view(1, 1, -1),
        "shift_hidden": state["7.norm.bias"].view(1, 1, -1),
    }
    for number, layer in enumerate(("4", "8", "10")):
        loaded[f"weights.{number}"] = state[f"{layer}.weight"][:, :, 0, 0].T[None]
        loaded[f"offsets.{number}"] = state[f"{layer}.bias"].view(1, 1, -1)
    network.load_state_dict(loaded)
    height, width = image.shape[2:]
    axes = [torch.linspace(-1, 1, side) for side in (height, width)]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 2)
    colours = image[0].permute(1, 2, 0)
    low, high = colours.amin((0, 1)), colours.amax((0, 1))
    scaled = ((colours - low) / (high - low) - 0.5).reshape(1, -1, 3)
    output = torch.from_numpy(found["output"])[0].permute(1, 2, 0).reshape(-1, 16)
    with torch.no_grad():
        ours = network(positions, scaled)[0]
    assert (ours - output).norm() / output.norm() < 1e-5


def test_the_networks_of_a_stack_are_independent() -> None:
    stack = ImplicitNetwork(5, images=3, width=8, frequencies=4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    for image, generator in enumerate(generators):
        stack.initialise(image, generator)
    torch.nn.init.normal_(stack.weights[2])
    positions, colours = torch.rand(3, 11, 2) - 0.5, torch.rand(3, 11, 3) - 0.5
    whole = stack(positions, colours)
    for image in range(3):
        index = slice(image, image + 1)
        assert torch.allclose(stack.select(image)(positions[index], colours[index]), whole[index], atol=1e-5)


def test_an_initial_network_adds_nothing(backbone: Backbone, pca: PCA, features: Tensor, images: Tensor) -> None:
    implicit = make(
        backbone,
        pca,
        FitOptions(steps=0, views=2, held_out=2, jitter=JITTER, averaging_sigma=None, back_project=False),
    )
    found = implicit(features, images, SIZE)
    with torch.no_grad():
        expected = Bilateral()(features, images, SIZE)
    assert torch.allclose(found, expected, atol=1e-5)
    assert [fit.explained_variance for fit in implicit.fits] == pytest.approx(
        [fit.initial_explained_variance for fit in implicit.fits]
    )


def test_an_initial_fit_is_the_base_of_the_multi_view_average(
    backbone: Backbone, pca: PCA, features: Tensor, images: Tensor
) -> None:
    options = replace(OPTIONS, steps=0, averaging_sigma=0.3, back_project=False)
    jbu = create_trainable("jbu", features.shape[-1]).eval().requires_grad_(False)
    found = Implicit(backbone, pca, jbu, options).fit(features[:1], images[:1])[0].query(SIZE)
    generator = image_generator(options.seed, images[0])
    views = JITTER.sample(options.views + options.held_out, SIZE, generator)[: options.views]
    normalised = backbone.normalise(images[:1]).permute(0, 2, 3, 1)
    warped = warp(normalised.expand(len(views), -1, -1, -1), views, JITTER.max_pad)
    with torch.no_grad():
        maps = torch.cat([features[:1], backbone.features(warped.permute(0, 3, 1, 2))])
        average = partial(
            average_views, views=[JITTER.identity, *views], max_pad=JITTER.max_pad, image_size=SIZE, sigma=0.3
        )
        averages = norm_preserving_mean(average, maps)[None]
        expected = jbu(averages, images[:1], SIZE, pca.as_channel_map())[0]
        single_view = jbu(features[:1], images[:1], SIZE, pca.as_channel_map())[0]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, single_view, atol=1e-3)


class Grey(Upsampler):
    """The mean feature everywhere: the worst initial map."""

    name = "grey"

    def row_tiles(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, size[0]), features.mean((1, 2), keepdim=True).expand(-1, *size, -1).clone()


def test_back_projection_reaches_the_bilinear_baseline(
    backbone: Backbone, pca: PCA, features: Tensor, images: Tensor
) -> None:
    options, image = replace(OPTIONS, steps=0, views=400, held_out=60), (features[:1], images[:1])
    bilinear, uncorrected, corrected = (
        Implicit(backbone, pca, base, replace(options, averaging_sigma=sigma, back_project=back)).fit(*image)[0]
        for base, sigma, back in ((Interpolate("bilinear"), None, False), (Grey(), 0.3, False), (Grey(), 0.3, True))
    )
    assert uncorrected.explained_variance < bilinear.explained_variance - 0.05
    assert corrected.explained_variance == pytest.approx(bilinear.explained_variance, abs=0.02)
    assert 0.2 < corrected.blend_weight < 1
    assert bilinear.blend_weight == uncorrected.blend_weight == 0


@pytest.mark.parametrize("size", [SIZE, (128, 96)], ids=["the image's", "larger"])
def test_the_residual_of_the_patch_means_is_upsampled_and_added(
    backbone: Backbone, pca: PCA, features: Tensor, images: Tensor, size: tuple[int, int]
) -> None:
    options, image = replace(OPTIONS, steps=3, averaging_sigma=None), (features[:1], images[:1])
    # The training views of both are the same; the second has a validation view more.
    validated = replace(options, views=options.views + 1, held_out=options.held_out - 1)
    (before,) = Implicit(backbone, pca, Grey(), replace(options, back_project=False)).fit(*image)
    (fit,) = Implicit(backbone, pca, Grey(), validated).fit(*image)
    assert 0.05 < fit.blend_weight < 1
    cells = before.query(SIZE).view(4, 16, 3, 16, -1).mean((1, 3))
    residual = pca.project(features[0]) - cells
    down, across = (
        interpolation_taps("bicubic", low, high, bicubic_a=-2.0) for low, high in zip((4, 3), size, strict=True)
    )
    added = resample(residual[None], down, across)[0]
    assert added.abs().max() > 0.1
    assert torch.allclose(fit.query(size), before.query(size) + fit.blend_weight * added, atol=1e-4)
    channels = features.shape[-1]
    # All channels take several parts, the last one smaller.
    assert channels % 5
    parts = fit_patch_means(before, (4, 3), SIZE, part_bytes=4 * SIZE[0] * SIZE[1] * 5)
    assert torch.allclose(parts, features[:1] - fit.residual, atol=1e-4)
    everything = fit.query(size, projection=ChannelMap(torch.eye(channels), torch.zeros(channels)))
    assert torch.allclose(pca.project(everything), fit.query(size), atol=1e-3)
    # The residual also has the channels that the PCA drops.
    cells = everything.view(4, size[0] // 4, 3, size[1] // 3, -1).mean((1, 3))
    rest = torch.eye(channels) - pca.components.T @ pca.components
    flat = features[0].mean((0, 1))
    assert ((cells - features[0]) @ rest).norm() < 0.97 * ((flat - features[0]) @ rest).norm()


def test_a_single_view_is_no_validation_view(backbone: Backbone, pca: PCA, features: Tensor, images: Tensor) -> None:
    (fit,) = make(backbone, pca, replace(OPTIONS, views=1, steps=2)).fit(features[:1], images[:1])
    assert fit.blend_weight == 0
    assert fit.query(SIZE).isfinite().all()


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


def test_a_fit_explains_held_out_views(backbone: Backbone, pca: PCA, features: Tensor, images: Tensor) -> None:
    for fit in make(backbone, pca, replace(OPTIONS, back_project=False)).fit(features, images):
        assert fit.explained_variance > fit.initial_explained_variance + 0.02


def test_what_cannot_be_predicted_is_uncertain(backbone: Backbone, pca: PCA, images: Tensor) -> None:
    """Half of the image is constant. Half is noise, where the features of views differ."""
    image = images[:1].clone()
    image[:, :32] = 128
    image[:, 32:] = torch.randint(0, 256, (1, 32, 48, 3), generator=torch.Generator().manual_seed(2)).byte()
    with torch.no_grad():
        features = backbone(image)
    (fit,) = make(backbone, pca, replace(OPTIONS, steps=150)).fit(features, image)
    sigma = fit.uncertainty(features)
    assert sigma.shape == (1, 4, 3, 1)
    assert sigma[:, 3].min() > 1.1 * sigma[:, 0].max()


def test_view_consistency_is_the_explained_variance_of_patch_means(
    fitted: Implicit, backbone: Backbone, pca: PCA, images: Tensor
) -> None:
    """Computed again, from the map that a query returns."""
    views = [View(1.0, 3, 12, True), View(1.0, 16, 0, False)]
    normalised = backbone.normalise(images[:1]).permute(0, 2, 3, 1)
    warped = warp(normalised.expand(2, -1, -1, -1), views, JITTER.max_pad)
    with torch.no_grad():
        targets = pca.project(backbone.features(warped.permute(0, 3, 1, 2)))
    consistency = float(view_consistency(fitted.fits[0].query(SIZE), views, targets, JITTER))
    predicted = warp(fitted.fits[0].query(SIZE).expand(2, -1, -1, -1), views, JITTER.max_pad)
    cells = predicted.view(2, targets.shape[1], 16, targets.shape[2], 16, -1).mean((2, 4))
    expected = 1 - (cells - targets).square().sum() / (targets - targets.mean((0, 1, 2))).square().sum()
    assert consistency == pytest.approx(float(expected), abs=1e-4)


def test_the_same_whoever_shares_the_batch(
    fitted: Implicit, backbone: Backbone, pca: PCA, features: Tensor, images: Tensor
) -> None:
    order = [2, 0]
    other = make(backbone, pca)
    other(features[order], images[order], SIZE, pca.as_channel_map())
    for place, number in enumerate(order):
        assert torch.equal(other.fits[place].query(SIZE), fitted.fits[number].query(SIZE))
        assert other.fits[place].explained_variance == fitted.fits[number].explained_variance


def test_another_seed_is_another_fit(
    fitted: Implicit, backbone: Backbone, pca: PCA, features: Tensor, images: Tensor
) -> None:
    other = make(backbone, pca, replace(OPTIONS, seed=1)).fit(features[:1], images[:1])[0]
    assert not torch.equal(other.query(SIZE), fitted.fits[0].query(SIZE))


@pytest.mark.parametrize("size", [SIZE, (96, 100)], ids=["the image's", "larger"])
def test_a_window_is_that_part_of_the_whole(fitted: Implicit, size: tuple[int, int]) -> None:
    whole = fitted.fits[1].query(size)
    assert whole.shape == (*size, 6)
    part = fitted.fits[1].query(size, (10, 7, 20, 31))
    assert torch.allclose(part, whole[10:30, 7:38], atol=1e-5)


@pytest.mark.parametrize("window", [(0, 0, 65, 48), (-1, 0, 4, 4), (0, 40, 4, 9), (0, 0, 0, 4)])
def test_a_window_beyond_the_map_is_refused(fitted: Implicit, window: tuple[int, int, int, int]) -> None:
    with pytest.raises(GeometryError, match="reaches beyond a map"):
        fitted.fits[0].query(SIZE, window)


def test_projection_equals_projecting_afterwards(fitted: Implicit, features: Tensor) -> None:
    projection = ChannelMap(torch.randn(4, features.shape[-1]), torch.randn(4))
    channels = features.shape[-1]
    whole = fitted.fits[0].query(SIZE, projection=ChannelMap(torch.eye(channels), torch.zeros(channels)))
    found = fitted.fits[0].query(SIZE, projection=projection)
    assert torch.allclose(found, whole @ projection.weight.T + projection.bias, atol=1e-3)


def test_larger_guidance_is_fitted_at_the_backbones_size(backbone: Backbone, pca: PCA, features: Tensor) -> None:
    large = (torch.rand(1, 96, 72, 3, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    implicit = Implicit(backbone, pca, Bilateral(), FitOptions(steps=2, views=2, held_out=1, jitter=JITTER), SIZE)
    assert implicit(features[:1], large, (96, 72), pca.as_channel_map()).shape == (1, 96, 72, 6)


def test_a_fit_may_start_from_a_jbu(backbone: Backbone, pca: PCA, features: Tensor, images: Tensor) -> None:
    """A JBU takes the backbone's channels, not those of the PCA."""
    jbu = create_trainable("jbu", features.shape[-1]).eval().requires_grad_(False)
    implicit = Implicit(
        backbone,
        pca,
        jbu,
        FitOptions(steps=0, views=2, held_out=1, jitter=JITTER, averaging_sigma=None, back_project=False),
    )
    found = implicit(features[:1], images[:1], SIZE)
    assert torch.allclose(found, jbu(features[:1], images[:1], SIZE), atol=1e-4)


def test_a_fit_goes_beyond_the_stack_it_starts_from(
    backbone: Backbone, pca: PCA, features: Tensor, images: Tensor
) -> None:
    jbu = JBU(features.shape[-1], stages=2).eval().requires_grad_(False)
    implicit = Implicit(
        backbone,
        pca,
        jbu,
        FitOptions(steps=0, views=2, held_out=1, jitter=JITTER, averaging_sigma=None, back_project=False),
    )
    (fit,) = implicit.fit(features[:1], images[:1])
    # 4x3 tokens, of which two stages make 16x12.
    found = fit.query((32, 24))
    low = jbu(features[:1], images[:1], (16, 12), pca.as_channel_map())
    expected = torch.nn.functional.interpolate(low.permute(0, 3, 1, 2), (32, 24), mode="bilinear")[0].permute(1, 2, 0)
    assert torch.allclose(found, expected, atol=1e-4)


def test_features_of_another_grid_are_refused(backbone: Backbone, pca: PCA, features: Tensor, images: Tensor) -> None:
    with pytest.raises(GeometryError, match=r"need uint8 images .* and their features \[B, 4, 3, C\]"):
        make(backbone, pca).fit(features[:, :3], images)
    with pytest.raises(GeometryError, match="need uint8 images"):
        make(backbone, pca).fit(features, images.float())

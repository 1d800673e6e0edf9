"""The implicit network against reference values, its loss against the formulas, and fits with a (random) backbone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.images import resize_images
from featup.multiview.fitting import FitModel, _SampledSteps, _WholeSteps, _window, views_explained
from featup.multiview.implicit import FAST, PAPER, Fit, Implicit, ImplicitField, ImplicitOptions
from featup.multiview.network import ImplicitNetwork, pixel_coordinates
from featup.multiview.sampling import ViewPositions, sample_tokens
from featup.multiview.view_features import image_generator
from featup.multiview.views import View, to_image, warp
from featup.projection import PCA, PCAFit
from featup.upsamplers import ChannelMap
from tests.featup.multiview.photographs import SIZE

OPTIONS = replace(
    FAST, steps=40, tokens=48, positions=8, views=10, held_out=3, max_pad=8, components=6, frequencies=8, lr=5e-3
)
WHOLE = replace(PAPER, steps=2, views=4, held_out=2, max_pad=8, step_views=2, components=6, frequencies=8)


@pytest.fixture(scope="module")
def pca(features: Tensor) -> PCA:
    fit = PCAFit(features.shape[-1])
    fit.add(features)
    return fit.solve(6)


@pytest.fixture(scope="module")
def fitted(backbone: Backbone, pca: PCA, features: Tensor, images: Tensor) -> list[ImplicitField]:
    return implicit_fields(Implicit(backbone, pca, OPTIONS), features, images)


def implicit_fields(implicit: Implicit, features: Tensor, images: Tensor) -> list[ImplicitField]:
    fields = implicit.fields(features, images)
    assert all(isinstance(field, ImplicitField) for field in fields)
    return fields  # type: ignore[return-value]


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
    network = ImplicitNetwork(16, frequencies=count)
    # The original adds its biases [2, 5, n] to [n, 5] coordinates after a reshape: the order of the numbers decides.
    loaded = {"biases": state["1.biases"].reshape(2, count, 5)}
    for ours, theirs in (("norms.0", "2.norm"), ("norms.1", "7.norm"), ("first", "4"), ("second", "8"), ("last", "10")):
        weight = state[f"{theirs}.weight"]
        loaded |= {f"{ours}.weight": weight.flatten(1) if weight.dim() > 1 else weight}
        loaded |= {f"{ours}.bias": state[f"{theirs}.bias"]}
    network.load_state_dict(loaded)
    # The original's own rounding: waves of 22 thousand radians leave no digits for another one to agree on.
    axes = [torch.linspace(-1, 1, side) for side in image.shape[2:]]
    for axis in axes:
        assert torch.allclose(pixel_coordinates(torch.arange(len(axis)), len(axis)), axis, atol=1e-6)
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    colours = image[0].permute(1, 2, 0)
    low, high = colours.amin((0, 1)), colours.amax((0, 1))
    output = torch.from_numpy(found["output"])[0].permute(1, 2, 0)
    with torch.no_grad():
        ours = network(positions, (colours - low) / (high - low) - 0.5)
    assert (ours - output).norm() / output.norm() < 1e-5


def test_dropout_is_of_whole_channels() -> None:
    network = ImplicitNetwork(200, frequencies=20, generator=torch.Generator().manual_seed(1))
    first, second = network.dropout_masks(0.2, torch.Generator().manual_seed(0))
    assert (first.shape, second.shape) == ((203,), (200,))
    for mask in (first, second):
        assert set(mask.unique().tolist()) == {0.0, 1.25}
        assert 0.7 < (mask > 0).float().mean() < 0.9
    positions, colours = torch.rand(5, 2), torch.rand(5, 3)
    dropped = network.hidden(positions, colours, (torch.zeros(203), torch.ones(200)))
    assert torch.allclose(dropped, dropped[:1].expand(5, -1), atol=1e-5), "inputs that are dropped still count"


@pytest.mark.parametrize(
    ("side", "cells", "kernel", "expected"),
    [
        (224, 14, None, (29, 15)),
        (224, 16, None, (29, 13)),
        (224, 28, None, (8, 8)),
        (448, 28, None, (43, 15)),
        (224, 14, 16, (16, 16)),
        (64, 1, None, (64, 64)),
        (56, 14, None, (4, 4)),
    ],
)
def test_windows_cover_the_image_and_are_the_originals_at_its_sizes(
    side: int, cells: int, kernel: int | None, expected: tuple[int, int]
) -> None:
    assert _window(side, cells, kernel) == expected
    window, stride = expected
    assert (cells - 1) * stride + window == side


def test_sampled_positions_lie_in_the_windows_of_their_tokens() -> None:
    views = [View(1.0, 3, 12, True), View(1.5, 16, 0, False)]
    generator = torch.Generator().manual_seed(0)
    sample = sample_tokens(400, 8, 2, (4, 3), (31, 30), (11, 9), generator)
    rows = sample.row - sample.tap // 30
    cols = sample.column - sample.tap % 30
    cells = sample.token % 12
    assert torch.equal(rows, (cells // 3 * 11)[:, None].expand_as(rows))
    assert torch.equal(cols, (cells % 3 * 9)[:, None].expand_as(cols))
    assert torch.equal(sample.view, (sample.token // 12)[:, None].expand_as(rows))
    assert len(sample.token.unique()) == 24
    assert (int(sample.row.max()), int(sample.column.max())) == (63, 47)
    row, column = ViewPositions(views, SIZE, 8)(sample)
    for number, view in enumerate(views):
        chosen = sample.view == number
        at = torch.stack([sample.row[chosen], sample.column[chosen]], -1).double()
        expected = to_image(view, at, SIZE, 8).round()
        assert torch.equal(torch.stack([row[chosen], column[chosen]], -1).double(), expected)


def test_a_whole_step_has_the_gradient_of_the_papers_loss(backbone: Backbone, images: Tensor) -> None:
    """All views of a step at once, by autograd, and with the formulas of the original."""
    options = replace(WHOLE, dropout=0.0)
    fit = Fit(backbone, None, options, images[:1])
    views, targets = fit.views[:4], fit.targets[:4]
    step = _WholeSteps(fit.model, options, fit.colours, views, targets, torch.Generator().manual_seed(3))
    step.backward()
    found = {name: parameter.grad.clone() for name, parameter in fit.model.named_parameters()}  # type: ignore[union-attr]
    fit.model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    fit.model.network.dropout_masks(0.0, generator)
    chosen = torch.randint(4, (2,), generator=generator).tolist()
    down, maps = fit.model.downsampler, fit.model.network(step.positions, fit.colours)[None]
    norms = maps.square().sum(-1, keepdim=True).sqrt()
    both = torch.cat([maps, norms], -1)
    loss = 0.05 * (norms.diff(dim=1).square().sum() + norms.diff(dim=2).square().sum()) / norms.numel()
    taps = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 2)
    planes = functional.pad(maps.permute(0, 3, 1, 2), [2] * 4, mode="reflect")
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2).expand(maps.shape[-1], 1, 5, 5)
    blurred = functional.conv2d(planes, kernel, groups=maps.shape[-1]).permute(0, 2, 3, 1)
    loss = loss + 0.1 * (blurred - maps).square().mean()
    for number in chosen:
        warped = warp(both, [views[number]], options.max_pad)
        out = down(warped, functional.linear(warped, down.attention.weight, down.attention.bias), fit.model.grid)
        target = targets[number][None]
        sigma = fit.model.log_sigma(target).exp()
        likelihood = ((out[..., :-1] - target).square() / (2 * sigma**2) + sigma.log()).mean()
        loss = loss + (likelihood + 0.001 * (out[..., -1] - target.norm(dim=-1)).square().mean()) / 2
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in fit.model.named_parameters():
        assert parameter.grad is not None
        # A softmax does not depend on the bias of its logits but through the taps' scales: that gradient is rounding.
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name


def test_sampled_steps_have_the_gradient_of_whole_steps(backbone: Backbone, images: Tensor) -> None:
    """With the regularisers off, a window for all positions: on average over the samples."""
    options = replace(
        OPTIONS, dropout=0.0, blur_pin=0.0, total_variation=0.0, zoom_share=0.0, tokens=4096, positions=256, views=1
    )
    fit = Fit(backbone, None, options, images[:1])
    gradients = []
    for kind in (_SampledSteps, _WholeSteps):
        fit.model.zero_grad()
        fit.model.downsampler.blur = False
        generator = torch.Generator().manual_seed(3)
        kind(fit.model, options, fit.colours, fit.views[:1], fit.targets[:1], generator).backward()
        gradients.append(fit.model.network.last.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.98
    assert gradients[0].norm() == pytest.approx(float(gradients[1].norm()), rel=0.1)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_fit_explains_held_out_views(
    backbone: Backbone, pca: PCA, features: Tensor, images: Tensor, warm: bool
) -> None:
    options = replace(OPTIONS, warm_start=warm, steps=0 if warm else 150, views=40)
    before, after = (
        Implicit(backbone, pca, one).fields(features[:1], images[:1])[0]
        for one in (replace(options, steps=0, warm_start=False), options)
    )
    assert before.explained_variance is not None
    assert after.explained_variance is not None
    assert after.explained_variance > max(0.0, before.explained_variance) + 0.02


def test_the_quality_is_that_of_held_out_views(backbone: Backbone, pca: PCA, features: Tensor, images: Tensor) -> None:
    """Computed again, from the map that a query returns, by the model's downsampler."""
    (field,) = implicit_fields(Implicit(backbone, pca, OPTIONS), features[:1], images[:1])
    views = OPTIONS.jitter.sample(13, SIZE, image_generator(OPTIONS.seed, images[0]))[10:]
    normalised = backbone.normalise(images[:1]).permute(0, 2, 3, 1)
    warped = warp(normalised.expand(3, -1, -1, -1), views, OPTIONS.max_pad)
    with torch.no_grad():
        targets = pca.project(backbone.features(warped.permute(0, 3, 1, 2)))
    maps = field.query(SIZE, pca.as_channel_map())
    assert field.explained_variance == pytest.approx(views_explained(field.model, maps, views, targets, 8), abs=1e-5)
    both = torch.cat([maps, maps.norm(dim=-1, keepdim=True)], -1)
    down = field.model.downsampler
    with torch.no_grad():
        predicted = torch.cat(
            [
                down(one[..., :-1], functional.linear(one, down.attention.weight, down.attention.bias), (4, 3))
                for one in (warp(both[None], [view], 8) for view in views)
            ]
        )
    expected = 1 - (predicted - targets).square().sum() / (targets - targets.mean((0, 1, 2))).square().sum()
    assert field.explained_variance == pytest.approx(float(expected), abs=1e-4)


def test_what_cannot_be_predicted_is_uncertain(backbone: Backbone, pca: PCA, images: Tensor) -> None:
    """Half of the image is constant. Half is noise, where the features of views differ."""
    image = images[:1].clone()
    image[:, :32] = 128
    image[:, 32:] = torch.randint(0, 256, (1, 32, 48, 3), generator=torch.Generator().manual_seed(2)).byte()
    with torch.no_grad():
        features = backbone(image)
    options = replace(OPTIONS, steps=400, zoom_share=0.0, warm_start=False)
    (field,) = implicit_fields(Implicit(backbone, pca, options), features, image)
    sigma = field.uncertainty(features)
    assert sigma.shape == (1, 4, 3, 1)
    assert sigma[:, 3].min() > 1.1 * sigma[:, 0].max()


@pytest.mark.parametrize("options", [OPTIONS, WHOLE], ids=["fast", "paper"])
def test_the_same_whoever_shares_the_batch(
    backbone: Backbone, pca: PCA, features: Tensor, images: Tensor, options: ImplicitOptions
) -> None:
    implicit, order = Implicit(backbone, pca, replace(options, steps=3)), [2, 0]
    whole = implicit(features, images, SIZE)
    assert whole.shape == (3, *SIZE, features.shape[-1])
    torch.manual_seed(7)
    assert torch.equal(implicit(features[order], images[order], SIZE), whole[order])
    other = Implicit(backbone, pca, replace(options, steps=3, seed=1))
    assert not torch.equal(other(features[:1], images[:1], SIZE), whole[:1])


def test_it_also_fits_under_inference_mode(backbone: Backbone, pca: PCA, images: Tensor) -> None:
    with torch.inference_mode():
        features = backbone(images[:1])
        found = Implicit(backbone, pca, OPTIONS)(features, images[:1], SIZE, pca.as_channel_map())
    assert found.isfinite().all()


def test_projection_equals_projecting_afterwards(fitted: list[ImplicitField], pca: PCA, features: Tensor) -> None:
    channels = features.shape[-1]
    projection = ChannelMap(torch.randn(3, channels, generator=torch.Generator().manual_seed(0)), torch.ones(3))
    everything = fitted[0].query(SIZE)
    assert torch.allclose(
        fitted[0].query(SIZE, projection), functional.linear(everything, *_parts(projection)), atol=1e-3
    )
    # All channels lie in the span of the PCA.
    assert torch.allclose(everything, pca.project(everything) @ pca.components + pca.mean, atol=1e-4)
    out = torch.empty(*SIZE, 3, dtype=torch.float16)
    fitted[0].query(SIZE, projection, out)
    assert torch.equal(out, fitted[0].query(SIZE, projection).half())


def _parts(projection: ChannelMap) -> tuple[Tensor, Tensor]:
    return projection.weight, projection.bias


def test_without_a_pca_it_is_that_of_the_images_own_views(backbone: Backbone, features: Tensor, images: Tensor) -> None:
    (field,) = implicit_fields(Implicit(backbone, None, OPTIONS), features[:1], images[:1])
    assert len(field.pca.components) == 6
    assert field.pca.count == 13 * 12
    assert field.query(SIZE).shape == (*SIZE, features.shape[-1])


def test_larger_guidance_is_fitted_at_the_backbones_size(
    backbone: Backbone, pca: PCA, features: Tensor, images: Tensor
) -> None:
    """The fit is that of the image at its size, and the positions of the map's centres stay the same."""
    large = resize_images(images[:1], (128, 96))
    implicit = Implicit(backbone, pca, OPTIONS)
    (field,) = implicit_fields(implicit, features[:1], large)
    (same,) = implicit_fields(implicit, features[:1], resize_images(large, SIZE))
    assert field.query((128, 96)).shape == (128, 96, features.shape[-1])
    found, expected = (replace(one, guidance=images[:1]).query(SIZE) for one in (field, same))
    assert torch.equal(found, expected)
    down = field.query((128, 96)).unflatten(0, (64, 2)).unflatten(2, (48, 2)).mean((1, 3))
    assert torch.cosine_similarity(down, found, dim=-1).mean() > 0.8


def test_images_that_do_not_belong_to_the_features_are_refused(
    backbone: Backbone, pca: PCA, features: Tensor, images: Tensor
) -> None:
    with pytest.raises(GeometryError, match=r"implicit: need uint8 images \[B, H, W, 3\] and their features"):
        Implicit(backbone, pca, OPTIONS).fields(features, images.float())


def test_a_warm_start_minimises_the_loss_over_the_last_layer(backbone: Backbone, images: Tensor) -> None:
    options = replace(OPTIONS, dropout=0.0, magnitude=0.0, total_variation=0.0, tokens=2048, positions=64, views=40)
    fit = Fit(backbone, None, options, images[:1])
    step = _SampledSteps(
        fit.model, options, fit.colours, fit.views[:40], fit.targets[:40], torch.Generator().manual_seed(1)
    )
    losses = []
    for warm in (False, True):
        if warm:
            step.warm_start()
        fit.model.zero_grad()
        step.backward()
        gradient = fit.model.network.last.weight.grad
        assert gradient is not None
        losses.append(float(gradient.norm()))
    assert losses[1] < 0.2 * losses[0], "the warm start is not near the minimum"
    assert isinstance(fit.model, FitModel)


def test_a_warm_start_is_smoother_the_more_differences_between_neighbours_weigh(
    backbone: Backbone, images: Tensor
) -> None:
    rough = []
    for weight in (0.0, 0.05, 1.0):
        options = replace(OPTIONS, warm_start=True, steps=0, total_variation=weight, blur_pin=0.0, views=40)
        fit = Fit(backbone, None, options, images[:1])
        for _ in fit.steps():
            pass
        with torch.no_grad():
            maps = fit.model.network(_all_positions(fit), fit.colours)
        differences = (maps.diff(dim=0).square().mean() + maps.diff(dim=1).square().mean()) / maps.var()
        rough.append(float(differences))
    assert rough[0] > 1.05 * rough[1] > 1.05**2 * rough[2], rough


def test_texture_finer_than_a_patch_hardly_enters_a_warm_start(backbone: Backbone, images: Tensor) -> None:
    # A checkerboard of pixels looks alike in every patch: what its colours do to the map is noise between pixels.
    options = replace(OPTIONS, warm_start=True, steps=0, views=40)
    rows, cols = torch.meshgrid(*(torch.arange(side) for side in images.shape[1:3]), indexing="ij")
    board = ((rows + cols) % 2 * 40 - 20)[..., None]
    textured = (images[:1].int().clamp(20, 235) + board).to(torch.uint8)
    fit = Fit(backbone, None, options, textured)
    for _ in fit.steps():
        pass
    with torch.no_grad():
        maps = fit.model.network(_all_positions(fit), fit.colours)
    means = maps.unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2))
    between = maps[::2, ::2] - means
    share = float(between.square().mean() / means.var())
    assert share < 0.15, share  # 0.30 where colours are damped no more than positions.


def _all_positions(fit: Fit) -> Tensor:
    rows, cols = (pixel_coordinates(torch.arange(side), side) for side in fit.size)
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).to(fit.colours)

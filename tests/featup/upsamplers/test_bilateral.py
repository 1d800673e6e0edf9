"""The fixed kernel, against its formula written as loops."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.upsamplers import JBU, Bilateral, ChannelMap, create_upsampler
from featup.upsamplers.bilateral import principal_scores
from pipeline.config.bilateral import BilateralOptions
from tests.featup.support import CHANNELS, TOLERANCE, picture, random, relative_error


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
    plain = Bilateral(sigma_space, sigma_colour, feature_components=0, same_resolution_stages=0, radius=radius)
    result = plain(features, image, high)
    assert relative_error(result[0], torch.from_numpy(expected)) <= TOLERANCE


def test_bilateral_follows_an_edge_that_bilinear_blurs() -> None:
    """Two regions whose border runs through the middle of tokens and is sharp in the image only."""
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
    with pytest.raises(GeometryError, match=rf"sigma_space={space}, sigma_colour={colour}, .* must all be positive"):
        Bilateral(space, colour)
    with pytest.raises(GeometryError, match=r"sigma_feature=0\.0 and sigma_coarse=0\.5 must all"):
        Bilateral(sigma_feature=0.0)
    with pytest.raises(GeometryError, match=r"sigma_coarse=0\.0 must all"):
        Bilateral(sigma_coarse=0.0)
    for name in ("feature_components", "same_resolution_stages"):
        with pytest.raises(GeometryError, match=f"{name}=-1 .*at least 0|{name}=-1 must be at least 0"):
            Bilateral(**{name: -1})


def test_windows_have_a_radius() -> None:
    """Bug: a JBU of radius 0 was made, and failed in its first stage with shapes that led nowhere."""
    for make in (lambda: Bilateral(radius=0), lambda: JBU(3, radius=0)):
        with pytest.raises(GeometryError, match=r"(bilateral|jbu): radius=0 leaves no window"):
            make()


def principal_scores_by_svd(features: Tensor, count: int) -> Tensor:
    """``[h, w, C]`` along the first right singular vectors, of total variance 1: by another algorithm."""
    vectors = features.flatten(0, 1).double()
    vectors = vectors - vectors.mean(0)
    _, _, directions = torch.linalg.svd(vectors, full_matrices=False)
    scores = vectors @ directions[:count].T
    return (scores / scores.square().sum(1).mean().sqrt()).view(*features.shape[:2], -1)


@pytest.mark.parametrize("shape", [(3, 4, 20), (6, 5, 7)], ids=["fewer-positions", "fewer-channels"])
def test_principal_scores_have_the_distances_of_principal_components(shape: tuple[int, int, int]) -> None:
    features = random(*shape)
    found = principal_scores(features[None], 4)[0].flatten(0, 1).double()
    expected = principal_scores_by_svd(features, 4).flatten(0, 1)
    assert relative_error(torch.cdist(found, found), torch.cdist(expected, expected)) <= TOLERANCE


def test_principal_scores_of_odd_maps() -> None:
    """More components than there are, one token, a constant map, and values that are not finite."""
    few = principal_scores(random(1, 2, 1, 5), 4)
    assert few.shape == (1, 2, 1, 4)
    assert few.square().sum() == pytest.approx(2, rel=1e-5)
    for features in (random(1, 1, 1, 5), torch.ones(1, 3, 4, 5)):
        assert torch.equal(principal_scores(features, 3), torch.zeros(*features.shape[:3], 3))
    broken = random(1, 3, 4, 5)
    broken[0, 1, 2] = math.inf
    assert principal_scores(broken, 3).isfinite().all()
    result = Bilateral()(broken, picture(1, 24, 32, 3), (24, 32))
    assert not result.isfinite().all()


def test_feature_affinity_by_its_formula() -> None:
    """One 2x stage whose guidance is grey: the weights are those of the features' distances alone."""
    features, grey = random(1, 3, 4, 6), torch.full((1, 6, 8, 3), 0.5)
    scores = principal_scores_by_svd(features[0], 2).movedim(-1, 0)[None]
    # The formula's own colours: as many as there are components, which it scales to [-1, 1].
    guide = functional.interpolate(scores, (6, 8), mode="bilinear")[0].movedim(0, -1).numpy()
    expected = bilateral_stage(features[0].double().numpy(), (guide + 1) / 2, 1.5, 0.7, 3)
    found = Bilateral(1.5, 0.1, 0.7, feature_components=2, same_resolution_stages=0)(features, grey, (6, 8))
    assert relative_error(found[0], torch.from_numpy(expected)) <= TOLERANCE


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_feature_affinity_keeps_edges_that_the_image_lacks(stages: int) -> None:
    features = random(1, 4, 6, 6) * 0.01
    features[:, :, 3:, 0] += 4
    grey = torch.full((1, 32, 48, 3), 0.5)
    sharp, blunt = (
        Bilateral(sigma_feature=sigma, feature_components=2, same_resolution_stages=stages)(features, grey, (32, 48))
        for sigma in (0.2, 1e4)
    )
    step = [float(maps[0, :, 28, 0].mean() - maps[0, :, 19, 0].mean()) for maps in (sharp, blunt)]
    assert step[0] > 3.5 > step[1] + 0.3


@pytest.mark.parametrize("stages", [0, 1])
def test_features_are_compared_before_a_projection(stages: int) -> None:
    upsampler = Bilateral(feature_components=3, same_resolution_stages=stages)
    features, guidance = random(2, 4, 5, 6), picture(2, 32, 40, 3)
    projection = ChannelMap(torch.eye(6)[3:5], torch.tensor([1.0, -1.0]))
    for size in ((32, 40), (4, 5)):
        whole = upsampler(features, guidance, size)
        found = upsampler(features, guidance, size, projection)
        assert relative_error(found, whole[..., 3:5] + projection.bias) <= TOLERANCE
        tiled = Bilateral(feature_components=3, same_resolution_stages=stages, tile_pixels=40)
        assert torch.equal(tiled(features, guidance, size), whole)
    assert (upsampler(features, guidance, (4, 5)) != features).any() == (stages > 0)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_a_same_resolution_stage_is_a_gaussian_of_its_sigma_where_all_is_alike(sigma: float) -> None:
    """Without colours and components to tell cells apart, by the definition, in the inner cells; norms are kept."""
    features = torch.randn(1, 9, 9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upsampler = Bilateral(feature_components=0, same_resolution_stages=1, sigma_coarse=sigma)
    found = upsampler(features, torch.zeros(1, 9, 9, 3, dtype=torch.uint8), (9, 9))
    offsets = torch.arange(-3, 4, dtype=torch.float64)
    kernel = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    windows = features.unfold(1, 7, 1).unfold(2, 7, 1)
    mean = torch.einsum("bijcyx,yx->bijc", windows, kernel)
    length = torch.einsum("bijcyx,yx->bijc", windows.norm(dim=3, keepdim=True), kernel)
    expected = mean / mean.norm(dim=-1, keepdim=True) * length
    torch.testing.assert_close(found[:, 3:-3, 3:-3], expected, rtol=1e-5, atol=1e-6)


def test_same_resolution_stages_preserve_norms() -> None:
    """The mean of vectors of different directions keeps their mean norm."""
    blunt = Bilateral(sigma_feature=1e4, same_resolution_stages=2)
    features, guidance = random(1, 6, 8, 6), picture(1, 48, 64, 3)
    unit = features / features.norm(dim=-1, keepdim=True)
    smoothed = blunt(unit, guidance, (6, 8))
    assert torch.allclose(smoothed.norm(dim=-1), torch.ones(1, 6, 8), atol=1e-5)
    # Directions are smoothed: neighbours become more alike.
    alike = [(maps[:, :, 1:] * maps[:, :, :-1]).sum(-1).mean() for maps in (unit, smoothed)]
    assert alike[1] > alike[0] + 0.3
    norms, feature_norms = blunt(features, guidance, (6, 8)).norm(dim=-1), features.norm(dim=-1)
    assert feature_norms.min() < norms.min() < norms.max() < feature_norms.max()
    doubled = blunt(2 * features, guidance, (6, 8)).norm(dim=-1)
    assert torch.allclose(doubled, 2 * norms, rtol=1e-4)
    zeros = blunt(torch.zeros(1, 6, 8, 6), guidance, (6, 8))
    assert torch.equal(zeros, torch.zeros(1, 6, 8, 6))


def test_a_result_depends_on_its_image_alone() -> None:
    features, guidance = random(3, 4, 5, 6), picture(3, 32, 40, 3)
    together = Bilateral()(features, guidance, (32, 40))
    for number in range(3):
        image = slice(number, number + 1)
        assert torch.equal(Bilateral()(features[image], guidance[image], (32, 40)), together[image])


def test_the_jobs_options_have_the_same_defaults() -> None:
    assert inspect.signature(Bilateral).bind(**BilateralOptions().bilateral).arguments == {
        name: parameter.default
        for name, parameter in inspect.signature(Bilateral).parameters.items()
        if name not in ("radius", "tile_pixels")
    }

"""The distance kernel of the JBU, its affinity features and same-resolution stages."""

import pytest
import torch

from featup.errors import GeometryError
from featup.upsamplers import JBU, Bilateral, ChannelMap, create_trainable
from tests.featup.support import picture, random


@pytest.mark.parametrize("sigmas", [(2.0, 0.1), (1.0, 0.2)])
def test_a_jbu_with_the_distance_kernel_starts_as_a_bilateral_filter(sigmas: tuple[float, float]) -> None:
    jbu = create_trainable("jbu", 6, "distance", sigmas).eval()
    features, guidance = random(1, 5, 7, 6), picture(1, 37, 50, 3)
    with torch.no_grad():
        result, expected = jbu(features, guidance, (37, 50)), Bilateral(*sigmas)(features, guidance, (37, 50))
    assert (result - expected).abs().max() < 1e-5
    paper = create_trainable("jbu", 6, "projection").eval()
    with torch.no_grad():
        assert (paper(features, guidance, (37, 50)) - expected).abs().max() > 1e-2


def affinity_jbu(same_resolution_stages: int, sigma: float = 0.4) -> JBU:
    jbu = JBU(
        6,
        kernel="distance",
        affinity_channels=2,
        same_resolution_stages=same_resolution_stages,
        initial_affinity_sigma=sigma,
    )
    jbu.set_affinity_projection(torch.eye(2, 6), torch.tensor([3.0, 1.0]))
    return jbu.eval().requires_grad_(False)


@pytest.mark.parametrize("same_resolution_stages", [0, 2])
def test_affinity_features_keep_edges_that_the_image_lacks(same_resolution_stages: int) -> None:
    features = random(1, 4, 6, 6) * 0.01
    features[:, :, 3:, 0] += 4
    grey = torch.full((1, 32, 48, 3), 0.5)
    sharp, blunt = (
        affinity_jbu(same_resolution_stages, sigma)(features, grey, (32, 48))[0, :, :, 0] for sigma in (0.2, 1e4)
    )
    # At the tokens' positions a step stays with affinity features, and is smoothed without.
    step = [map[:, 28].mean() - map[:, 19].mean() for map in (sharp, blunt)]
    assert step[0] > 3.5 > step[1] + 0.3


@pytest.mark.parametrize("same_resolution_stages", [0, 1])
def test_affinity_features_are_computed_before_a_projection(same_resolution_stages: int) -> None:
    jbu = affinity_jbu(same_resolution_stages)
    features, guidance = random(2, 4, 5, 6), picture(2, 32, 40, 3)
    projection = ChannelMap(torch.eye(6)[3:5], torch.tensor([1.0, -1.0]))
    for size in ((32, 40), (4, 5)):
        whole = jbu(features, guidance, size)
        assert torch.allclose(jbu(features, guidance, size, projection), whole[..., 3:5] + projection.bias, atol=1e-5)
        tiled = affinity_jbu(same_resolution_stages)
        tiled.tile_pixels = 40
        assert torch.equal(tiled(features, guidance, size), whole)
    assert (jbu(features, guidance, (4, 5)) != features).any() == (same_resolution_stages > 0)


def test_same_resolution_stages_preserve_norms() -> None:
    """The mean of vectors of different directions keeps their mean norm."""
    features, guidance = random(1, 6, 8, 6), picture(1, 48, 64, 3)
    unit = features / features.norm(dim=-1, keepdim=True)
    smoothed = affinity_jbu(2, 1e4)(unit, guidance, (6, 8))
    assert torch.allclose(smoothed.norm(dim=-1), torch.ones(1, 6, 8), atol=1e-5)
    # Directions are smoothed: neighbours become more alike.
    alike = [(maps[:, :, 1:] * maps[:, :, :-1]).sum(-1).mean() for maps in (unit, smoothed)]
    assert alike[1] > alike[0] + 0.3
    # The norm is a weighted mean of the norms: between the least and the largest, and proportional to them.
    norms = affinity_jbu(1, 1e4)(features, guidance, (6, 8)).norm(dim=-1)
    feature_norms = features.norm(dim=-1)
    assert feature_norms.min() < norms.min() < norms.max() < feature_norms.max()
    doubled = affinity_jbu(1, 1e4)(2 * features, guidance, (6, 8)).norm(dim=-1)
    assert torch.allclose(doubled, 2 * norms, rtol=1e-4)
    zeros = affinity_jbu(1)(torch.zeros(1, 6, 8, 6), guidance, (6, 8))
    assert torch.equal(zeros, torch.zeros(1, 6, 8, 6))


def test_a_lower_keys_a_is_sharper() -> None:
    """On a grey image every stage smooths a step, and the overshoot of the cubic counteracts it."""
    features = torch.zeros(1, 6, 6, 1)
    features[:, :, 3:] = 1
    grey = torch.full((1, 48, 48, 3), 0.5)
    steps = []
    for a in (-0.75, -2.0):
        jbu = JBU(1, kernel="distance", bicubic_a=a).eval().requires_grad_(False)
        steps.append(float(jbu(features, grey, (48, 48))[0, 24, :, 0].diff().max()))
    assert steps[1] > 1.1 * steps[0]


def test_options_that_do_not_fit() -> None:
    with pytest.raises(GeometryError, match="only the distance kernel"):
        JBU(6, affinity_channels=2)
    with pytest.raises(GeometryError, match="affinity_channels=7"):
        JBU(6, kernel="distance", affinity_channels=7)
    with pytest.raises(GeometryError, match=r"initial_same_resolution_sigma=0\.0"):
        JBU(6, kernel="distance", same_resolution_stages=1, initial_same_resolution_sigma=0.0)
    with pytest.raises(GeometryError, match=r"\[2, 6\], got \[3, 6\]"):
        affinity_jbu(0).set_affinity_projection(torch.eye(3, 6), torch.ones(3))

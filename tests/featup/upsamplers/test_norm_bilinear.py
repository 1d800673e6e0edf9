"""Bilinear interpolation with the norms of bilinear interpolation's inputs."""

import torch

from featup.upsamplers import Interpolate, NormBilinear
from tests.featup.support import CHANNELS, TOLERANCE, picture, random, relative_error


def test_directions_are_the_mean_vectors_and_norms_the_mean_norms() -> None:
    features, image, size = random(2, 3, 4, CHANNELS), picture(2, 20, 31, 3), (20, 31)
    bilinear = Interpolate("bilinear")
    found = NormBilinear()(features, image, size)
    norms = bilinear(features.norm(dim=-1, keepdim=True), image, size)
    assert relative_error(found.norm(dim=-1, keepdim=True), norms) <= TOLERANCE
    means = bilinear(features, image, size)
    directions = means / means.norm(dim=-1, keepdim=True)
    assert relative_error(found / found.norm(dim=-1, keepdim=True), directions) <= TOLERANCE


def test_zero_vectors_stay_zero() -> None:
    assert torch.equal(NormBilinear()(torch.zeros(1, 2, 2, 3), picture(1, 8, 8, 3), (8, 8)), torch.zeros(1, 8, 8, 3))

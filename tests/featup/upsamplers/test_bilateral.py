"""The fixed kernel, against its formula written as loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.upsamplers import JBU, Bilateral, create_upsampler
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
    result = Bilateral(sigma_space, sigma_colour, radius)(features, image, high)
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
    with pytest.raises(GeometryError, match=rf"sigma_space={space} and sigma_colour={colour} must both be positive"):
        Bilateral(space, colour)


def test_windows_have_a_radius() -> None:
    """Bug: a JBU of radius 0 was made, and failed in its first stage with shapes that led nowhere."""
    for make in (lambda: Bilateral(radius=0), lambda: JBU(3, radius=0)):
        with pytest.raises(GeometryError, match=r"(bilateral|jbu): radius=0 leaves no window"):
            make()

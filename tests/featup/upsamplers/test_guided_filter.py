"""The guided filter against its definition, window by window."""

import pytest
import torch
from torch import Tensor

from featup.errors import GeometryError
from featup.upsamplers import GuidedFilter, Interpolate
from tests.featup.support import CHANNELS, TOLERANCE, picture, random, relative_error
from tests.featup.upsamplers.support import discs


def by_definition(values: Tensor, image: Tensor, radius: int, epsilon: float) -> Tensor:
    """A ridge regression with an intercept in every window ``[H, W, K]``, and the mean of their predictions."""
    height, width, channels = values.shape
    windows = [
        (slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1))
        for y in range(height)
        for x in range(width)
    ]
    slopes = torch.zeros(height * width, 3, channels, dtype=torch.float64)
    intercepts = torch.zeros(height * width, channels, dtype=torch.float64)
    for number, window in enumerate(windows):
        colours, targets = image[window].reshape(-1, 3).double(), values[window].reshape(-1, channels).double()
        centred = colours - colours.mean(0)
        gram = centred.T @ centred / len(colours) + epsilon * torch.eye(3, dtype=torch.float64)
        slopes[number] = torch.linalg.solve(gram, centred.T @ targets / len(colours))
        intercepts[number] = targets.mean(0) - colours.mean(0) @ slopes[number]
    slopes, intercepts = slopes.view(height, width, 3, channels), intercepts.view(height, width, channels)
    result = torch.empty(height, width, channels, dtype=torch.float64)
    for number, window in enumerate(windows):
        y, x = divmod(number, width)
        mean = slopes[window].reshape(-1, 3, channels).mean(0)
        result[y, x] = image[y, x].double() @ mean + intercepts[window].reshape(-1, channels).mean(0)
    return result


@pytest.mark.parametrize(("radius", "size"), [(1, (9, 7)), (2, (12, 17)), (16, (10, 11))], ids=str)
def test_it_is_a_regression_in_every_window(radius: int, size: tuple[int, int]) -> None:
    features, image = random(1, 3, 4, CHANNELS), picture(1, *size, 3)
    interpolated = Interpolate("bilinear")(features, image, size)
    expected = by_definition(interpolated[0], image[0] / 255, radius, 0.01)
    assert relative_error(GuidedFilter(radius)(features, image, size)[0], expected) <= TOLERANCE


def test_tiles_are_of_one_map() -> None:
    """A map of several tiles, whose windows reach into the neighbours."""
    features, image = random(1, 8, 3, CHANNELS), picture(1, 40, 12, 3)
    upsampler = GuidedFilter(1)
    tiles = list(upsampler.row_tiles(features, image, (40, 12)))
    assert len(tiles) > 2
    expected = by_definition(Interpolate("bilinear")(features, image, (40, 12))[0], image[0] / 255, 1, 0.01)
    assert relative_error(torch.cat([tile for _, tile in tiles], 1)[0], expected) <= TOLERANCE


def test_constant_features_stay_constant() -> None:
    features, image = torch.full((1, 3, 4, 2), 3.0), picture(1, 30, 44, 3)
    assert relative_error(GuidedFilter(4)(features, image, (30, 44)), torch.full((1, 30, 44, 2), 3.0)) <= TOLERANCE


def test_edges_are_nearer_to_the_image_than_bilinear_ones() -> None:
    image, fine = discs(4, seed=3)
    coarse = torch.nn.functional.avg_pool2d(fine.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    errors = [
        (upsampler(coarse, image, (28, 36)) - fine).square().mean()
        for upsampler in (GuidedFilter(8), Interpolate("bilinear"))
    ]
    assert errors[0] < 0.6 * errors[1]


def test_options_that_cannot_be() -> None:
    for options in ({"radius": 0}, {"epsilon": 0.0}):
        with pytest.raises(GeometryError, match=r"guided_filter: radius=\d+ must be at least 1 and epsilon="):
            GuidedFilter(**options)  # type: ignore[arg-type]

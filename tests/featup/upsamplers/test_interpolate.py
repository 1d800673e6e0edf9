"""Interpolation, against torch's own."""

from typing import Any

import pytest
from torch.nn import functional

from featup.upsamplers import Interpolate
from tests.featup.support import CHANNELS, TOLERANCE, picture, random, relative_error


@pytest.mark.parametrize("kind", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(4, 5), (8, 10), (17, 29)], ids=str)
def test_interpolation_is_that_of_torch(kind: Any, size: tuple[int, int]) -> None:
    features = random(2, 4, 5, CHANNELS)
    corners = {} if kind == "nearest" else {"align_corners": False}
    expected = functional.interpolate(features.movedim(-1, 1), size, mode=kind, **corners).movedim(1, -1)
    result = Interpolate(kind)(features, picture(2, 3, 3, 3), size)
    assert relative_error(result, expected) <= TOLERANCE

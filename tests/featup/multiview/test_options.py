"""The checks of the options of a fit."""

import math
from typing import Any

import pytest

from featup.errors import GeometryError
from featup.multiview import FitOptions

LEAST = {
    "steps": 0,
    "tokens": 1,
    "positions": 1,
    "views": 1,
    "held_out": 1,
    "width": 1,
    "frequencies": 1,
    "magnitude": 0,
    "blur": 0,
    "seed": 0,
}


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("below", [1, math.inf, math.nan], ids=["below", "infinite", "nan"])
def test_numbers_below_their_least(name: str, below: float) -> None:
    """Bug: a negative seed, magnitude or blur passed, and failed or misled the fit of the first image."""
    options: dict[str, Any] = {name: LEAST[name] - below}
    with pytest.raises(GeometryError, match=rf"implicit: {name}=.* must be at least {LEAST[name]}"):
        FitOptions(**options)


@pytest.mark.parametrize("name", LEAST)
def test_the_least_numbers_are_served(name: str) -> None:
    options: dict[str, Any] = {name: LEAST[name]}
    assert getattr(FitOptions(**options), name) == LEAST[name]


@pytest.mark.parametrize("lr", [0.0, -1e-3, math.inf, math.nan])
def test_a_learning_rate_is_positive_and_finite(lr: float) -> None:
    with pytest.raises(GeometryError, match=r"implicit: lr=.* must be positive and finite"):
        FitOptions(lr=lr)


@pytest.mark.parametrize("highest", [math.inf, math.nan])
def test_the_highest_frequency_is_finite(highest: float) -> None:
    with pytest.raises(GeometryError, match=r"implicit: highest=.* must be a finite"):
        FitOptions(highest=highest)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_the_sigma_of_the_average_is_positive(sigma: float) -> None:
    with pytest.raises(GeometryError, match=r"averaging_sigma=.* cells must be positive, or None"):
        FitOptions(averaging_sigma=sigma)


@pytest.mark.parametrize("margin", [-0.1, 1.0, math.nan])
def test_a_margin_is_a_share(margin: float) -> None:
    with pytest.raises(GeometryError, match="is a share of an error"):
        FitOptions(margin=margin)


@pytest.mark.parametrize(
    ("views", "back_project", "validation"), [(1, True, 0), (2, True, 1), (32, True, 4), (32, False, 0)]
)
def test_views_are_split_into_training_and_validation(views: int, back_project: bool, validation: int) -> None:
    options = FitOptions(views=views, back_project=back_project)
    assert (options.training_views, options.validation_views) == (views - validation, validation)

"""The checks of the options of multi-view averages and of implicit fits, and the paper's numbers."""

import math
from dataclasses import replace
from typing import Any

import pytest

from featup.errors import GeometryError
from featup.multiview import FAST, PAPER, MultiViewOptions

LEAST = {
    "views": 1,
    "held_out": 1,
    "steps": 0,
    "components": 1,
    "frequencies": 1,
    "magnitude": 0,
    "total_variation": 0,
    "blur_pin": 0,
    "kernel": 1,
    "step_views": 1,
    "tokens": 1,
    "positions": 1,
    "seed": 0,
}
LEAST_OF_VIEWS = {"views": 1, "held_out": 0, "max_pad": 0, "directions": 1, "seed": 0}


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("below", [1, math.inf, math.nan], ids=["below", "infinite", "nan"])
def test_numbers_below_their_least(name: str, below: float) -> None:
    """Bug: a negative seed, magnitude or blur passed, and failed or misled the fit of the first image."""
    options: dict[str, Any] = {name: LEAST[name] - below}
    with pytest.raises(GeometryError, match=rf"implicit: {name}=.* must be at least {LEAST[name]}"):
        replace(FAST, **options)


@pytest.mark.parametrize("name", LEAST_OF_VIEWS)
def test_numbers_of_views_below_their_least(name: str) -> None:
    options: dict[str, Any] = {name: LEAST_OF_VIEWS[name] - 1}
    with pytest.raises(GeometryError, match=rf"multiview: {name}=.* must be at least {LEAST_OF_VIEWS[name]}"):
        MultiViewOptions(**options)


def test_the_least_numbers_are_served() -> None:
    replace(FAST, **LEAST)  # type: ignore[arg-type]
    MultiViewOptions(**LEAST_OF_VIEWS)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1e-3, math.inf, math.nan])
def test_rates_and_sigmas_are_positive_and_finite(value: float) -> None:
    with pytest.raises(GeometryError, match=r"implicit: lr=.* must be positive and finite"):
        replace(FAST, lr=value)
    with pytest.raises(GeometryError, match=r"multiview: sigma=.* must be positive and finite"):
        MultiViewOptions(sigma=value)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_shares_are_below_one(share: float) -> None:
    with pytest.raises(GeometryError, match=r"multiview: margin=.* is a share"):
        MultiViewOptions(margin=share)
    with pytest.raises(GeometryError, match=r"implicit: dropout=.* is a share"):
        replace(FAST, dropout=share)


@pytest.mark.parametrize("options", [{"highest": math.inf}, {"lowest": math.nan}, {"lowest": 11.0}])
def test_frequencies_are_finite_and_in_order(options: dict[str, Any]) -> None:
    with pytest.raises(GeometryError, match="must be finite logarithms of frequencies, in this order"):
        replace(FAST, **options)


@pytest.mark.parametrize("options", [{"max_pad": -1}, {"max_zoom": 0.5}, {"zoom_share": 1.5}])
def test_views_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(GeometryError, match="jitter: "):
        replace(FAST, **options)


@pytest.mark.parametrize(
    ("views", "back_project", "validation"), [(1, True, 0), (2, True, 1), (32, True, 4), (32, False, 0)]
)
def test_views_are_split_into_training_and_validation(views: int, back_project: bool, validation: int) -> None:
    options = MultiViewOptions(views=views, back_project=back_project)
    assert (options.training_views, options.validation_views) == (views - validation, validation)


def test_the_papers_numbers_are_those_of_its_code() -> None:
    """Of configs/implicit_upsampler.yaml and train_implicit_upsampler.py; the rate is the default of torch's NAdam."""
    assert (PAPER.views, PAPER.steps, PAPER.step_views, PAPER.tokens) == (3000, 1200, 10, None)
    assert (PAPER.lr, PAPER.lr_decay, PAPER.dropout, PAPER.components) == (2e-3, False, 0.2, 128)
    assert (PAPER.frequencies, PAPER.lowest, PAPER.highest) == (30, -2.0, 10.0)
    assert (PAPER.magnitude, PAPER.total_variation, PAPER.blur_pin) == (0.001, 0.05, 0.1)
    assert (PAPER.max_pad, PAPER.max_zoom, PAPER.zoom_share, PAPER.flip) == (30, 1.8, 0.5, True)
    assert not PAPER.warm_start

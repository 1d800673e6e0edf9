"""The deep image prior."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from featup.upsamplers import (
    DeepImagePrior,
    Interpolate,
)
from tests.featup.support import CHANNELS, TOLERANCE, picture, random, relative_error
from tests.featup.upsamplers.support import discs


@pytest.mark.parametrize("drive", ["image", "noise"])
def test_deep_image_prior_explains_the_features(drive: Any) -> None:
    image, sharp = discs(1, 0)
    low = functional.avg_pool2d(sharp.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1) + 10
    result = DeepImagePrior(steps=150, width=16, drive=drive)(low, image, (28, 36))
    means = functional.avg_pool2d(result.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    assert float((means - low).square().mean() / low.var()) <= 0.02
    if drive == "image":
        blind = Interpolate("bilinear")(low, image, (28, 36))
        assert functional.mse_loss(result - 10, sharp) < 0.5 * functional.mse_loss(blind - 10, sharp)


def test_deep_image_prior_is_deterministic() -> None:
    features, image = random(1, 3, 4, CHANNELS), picture(1, 13, 17, 3)
    state = torch.get_rng_state()
    for drive in ("image", "noise"):
        first, again, other = (
            DeepImagePrior(steps=5, width=8, seed=seed, drive=drive)(features, image, (13, 17))  # type: ignore[arg-type]
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"


def test_deep_image_prior_keeps_constants() -> None:
    constant = random(1, 1, 1, CHANNELS).expand(1, 3, 4, CHANNELS)
    result = DeepImagePrior(steps=5, width=8)(constant, picture(1, 13, 17, 3), (13, 17))
    assert relative_error(result, constant[:, :1, :1].expand(1, 13, 17, CHANNELS)) <= TOLERANCE

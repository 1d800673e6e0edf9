"""The ceiling of explained variance, with backbones whose noise is known."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.evaluation.noise_ceiling import noise_ceiling, partner_views
from featup.multiview.views import Jitter, View, warp
from featup.training.losses import explained_variance

STRIDE = (4, 8)
JITTER = Jitter(max_pad=9, zoom=(1.0, 1.0))
SIZE = (48, 64)


class NoisyPatches:
    """A backbone of patch means, and noise of a standard deviation that is new in every view."""

    def __init__(self, noise: float) -> None:
        self.noise = noise
        self.generator = torch.Generator().manual_seed(3)
        coarse = torch.randn(1, 5, 24, 32, generator=self.generator)
        self.image = functional.interpolate(coarse, SIZE, mode="bilinear").permute(0, 2, 3, 1)

    def clean(self, views: Sequence[View]) -> Tensor:
        warped = warp(self.image.expand(len(views), -1, -1, -1), views, JITTER.max_pad)
        return functional.avg_pool2d(warped.permute(0, 3, 1, 2), STRIDE).permute(0, 2, 3, 1)

    def __call__(self, views: Sequence[View]) -> Tensor:
        clean = self.clean(views)
        return clean + self.noise * torch.randn(clean.shape, generator=self.generator)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_partners_are_of_the_same_pixels() -> None:
    for view in JITTER.sample(20, SIZE, generator()):
        partners = partner_views(view, JITTER, STRIDE, 50, generator())
        assert View(view.zoom, view.top, view.left, not view.flip) in partners
        assert view not in partners
        assert len(set(partners)) == len(partners)
        for one in partners:
            assert (one.top - view.top) % 4 == 0
            assert (one.left - view.left) % 8 == 0
            assert max(one.top, one.left) <= 18
    assert len(partner_views(view, JITTER, STRIDE, 3, generator())) == 3


@pytest.mark.parametrize("partners", [1, 4])
def test_without_noise_everything_can_be_explained(partners: int) -> None:
    backbone = NoisyPatches(0.0)
    views = JITTER.sample(6, SIZE, generator())
    ceiling = noise_ceiling(backbone, views, backbone(views), JITTER, STRIDE, partners, generator())
    assert ceiling == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("partners", [1, 2, 4])
def test_it_is_what_the_true_map_explains(partners: int) -> None:
    """However few partners there are: the noise of their mean is accounted for."""
    backbone = NoisyPatches(0.3)
    views = JITTER.sample(24, SIZE, generator())
    targets = backbone(views)
    ceiling = noise_ceiling(backbone, views, targets, JITTER, STRIDE, partners, generator())
    reached = float(explained_variance(backbone.clean(views), targets))
    assert 0.3 < reached < 0.9
    assert ceiling == pytest.approx(reached, abs=0.02)

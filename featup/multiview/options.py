"""Options of the multi-view average and of the implicit fit, checked on construction."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

from featup.errors import GeometryError
from featup.multiview.views import Jitter

__all__ = ["FAST", "PAPER", "ImplicitOptions", "MultiViewOptions"]


def _check_least(name: str, options: Any, least: dict[str, float]) -> None:
    for attribute, lowest in least.items():
        value = getattr(options, attribute)
        if not (isfinite(value) and value >= lowest):
            raise GeometryError(f"{name}: {attribute}={value} must be at least {lowest}")


def _check_positive(name: str, options: Any, attribute: str) -> None:
    value = getattr(options, attribute)
    if not (isfinite(value) and value > 0):
        raise GeometryError(f"{name}: {attribute}={value} must be positive and finite")


def _check_share(name: str, options: Any, attribute: str) -> None:
    value = getattr(options, attribute)
    if not 0 <= value < 1:
        raise GeometryError(f"{name}: {attribute}={value} is a share, at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class MultiViewOptions:
    """How the views of an image are averaged.

    Attributes:
        views: Jittered views of an image, at least 1: training views and, after them, :attr:`validation_views`.
        held_out: Further views that measure the explained variance, at least 0; of none it is not measured.
        max_pad: Largest shift of a view in pixels, at least 0.
        flip: Whether half of the views are mirrored.
        sigma: Of the weights of the average, in cells of the backbone's grid, above 0; see
            :func:`featup.multiview.average.average_views`.
        back_project: Whether the residual between the average and the map's patch means is added.
        margin: Share of the bilinear baseline's squared error on validation views by which the corrected map must
            fall below it, in [0, 1). The blend weight of the residual is the smallest that does.
        directions: Random projection directions on which views are compared, at least 1.
        seed: Of the views and the directions, at least 0.

    Raises:
        GeometryError: a number out of its range.
    """

    views: int = 16
    held_out: int = 0
    max_pad: int = 20
    flip: bool = True
    sigma: float = 0.3
    back_project: bool = True
    margin: float = 0.02
    directions: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _check_least("multiview", self, {"views": 1, "held_out": 0, "max_pad": 0, "directions": 1, "seed": 0})
        _check_positive("multiview", self, "sigma")
        _check_share("multiview", self, "margin")

    @property
    def jitter(self) -> Jitter:
        """The distribution of the views."""
        return Jitter(self.max_pad, (1.0, 1.0), self.flip)

    @property
    def validation_views(self) -> int:
        """How many of the ``views``, the last ones, choose the blend weight; none of a single view."""
        return min(self.views - 1, max(1, self.views // 8)) if self.back_project else 0

    @property
    def training_views(self) -> int:
        """How many of the ``views``, the first ones, are averaged."""
        return self.views - self.validation_views


@dataclass(frozen=True, kw_only=True)
class ImplicitOptions:
    """How the implicit network is fitted to an image.

    Attributes:
        views: Views that the network is fitted to, at least 1.
        held_out: Further views that measure the explained variance, at least 1.
        steps: Steps of NAdam, at least 0.
        lr: Learning rate, above 0.
        lr_decay: Whether the learning rate falls linearly to 0.
        components: K, principal components of the features of the image's views where no PCA is given, at least 1.
        frequencies: For each coordinate, at least 1, evenly spaced in their logarithm.
        lowest, highest: Logarithms of the lowest and of the highest frequency, in radians on positions from -1 to 1.
        dropout: Share of whole channels that is dropped in a step, in [0, 1).
        magnitude: Weight of the squared error of the features' norms, at least 0.
        total_variation: Weight of the total variation of the norms, at least 0; in the warm start, of the
            mean square of the differences between neighbouring features.
        blur_pin: Weight of the squared difference between the map and its Gaussian blur, at least 0.
        max_pad, max_zoom, flip, zoom_share: Of the views; see :class:`featup.multiview.views.Jitter`.
        kernel: Least side in pixels of the window that a token attends to; ``None`` for twice the patch less three.
        step_views: Views of a step of which all tokens are compared, at least 1.
        tokens: Tokens of all views that a step samples, at least 1, in place of whole views; ``None`` samples none.
        positions: Positions that are sampled in the window of each of these tokens, at least 1.
        warm_start: Whether the last layer starts from the ridge regression of the views' features.
        seed: Of the views, the samples, the initial weights and the dropout, at least 0.

    Raises:
        GeometryError: a number out of its range.
    """

    views: int
    held_out: int = 8
    steps: int
    lr: float = 2e-3
    lr_decay: bool
    components: int = 128
    frequencies: int = 30
    lowest: float = -2.0
    highest: float = 10.0
    dropout: float = 0.2
    magnitude: float = 1e-3
    total_variation: float = 0.05
    blur_pin: float = 0.1
    max_pad: int = 30
    max_zoom: float = 1.8
    flip: bool = True
    zoom_share: float = 0.5
    kernel: int | None = None
    step_views: int = 10
    tokens: int | None
    positions: int = 16
    warm_start: bool
    seed: int = 0

    def __post_init__(self) -> None:
        least: dict[str, float] = dict.fromkeys(
            ("views", "held_out", "components", "frequencies", "step_views", "positions"), 1
        )
        least |= dict.fromkeys(("steps", "magnitude", "total_variation", "blur_pin", "seed"), 0)
        least |= {name: 1 for name in ("kernel", "tokens") if getattr(self, name) is not None}
        _check_least("implicit", self, least)
        _check_positive("implicit", self, "lr")
        _check_share("implicit", self, "dropout")
        if not (isfinite(self.highest) and isfinite(self.lowest) and self.lowest <= self.highest):
            raise GeometryError(
                f"implicit: lowest={self.lowest} and highest={self.highest} must be finite logarithms of frequencies, "
                "in this order"
            )
        _ = self.jitter  # Raises for views that cannot be.

    @property
    def jitter(self) -> Jitter:
        """The distribution of the views."""
        return Jitter(self.max_pad, (1.0, self.max_zoom), self.flip, self.zoom_share)


PAPER = ImplicitOptions(views=3000, steps=1200, lr_decay=False, tokens=None, warm_start=False)
"""The paper's numbers, and those of its published code where the paper has none."""

FAST = ImplicitOptions(views=100, steps=0, lr_decay=True, tokens=256, warm_start=True)
"""Fewer views, and the warm start alone: the closed form of the network's last layer, without any step.

Steps after it lowered the explained variance of held-out views at every learning rate that was tried
(``benchmarks/implicit.md``). Steps that are asked for sample tokens of all views and positions in their windows: their
cost does not depend on the size of the image."""

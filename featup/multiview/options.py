"""Options of an implicit fit, checked on construction."""

from dataclasses import dataclass, field
from math import isfinite

from featup.errors import GeometryError
from featup.multiview.views import Jitter

__all__ = ["FitOptions"]


@dataclass(frozen=True)
class FitOptions:
    """How the implicit network is fitted to an image.

    Attributes:
        steps: Steps of Adam, at least 0.
        tokens: Tokens sampled in a step, at least 1.
        positions: Positions sampled in the patch of each token, at least 1.
        views: Views that the fit may use, at least 1: training views and, after them, :attr:`validation_views`.
        held_out: Views held out to measure the explained variance, at least 1.
        jitter: Distribution of the views.
        lr: Initial learning rate of Adam, above 0; it falls linearly to 0.
        width: Units of the network's hidden layers, at least 1.
        frequencies: Frequencies for each coordinate, at least 1, from ``exp(-2)`` to ``exp(highest)`` radians.
        highest: Logarithm of the highest frequency, on coordinates scaled to [-0.5, 0.5].
        magnitude: Weight of the mean square of the network's output, at least 0.
        blur: Weight of the mean square of the output's patch means, at least 0; it pins the coarse features.
        averaging_sigma: Sigma of the multi-view average in cells of the backbone's grid, above 0, see
            :func:`featup.multiview.views.average_views`; ``None`` fits to single-view features.
        back_project: Whether to add the upsampled residual between the multi-view average and the map's patch means.
        margin: Share of the bilinear baseline's squared error on validation views by which the corrected map must
            fall below it, in [0, 1). The blend weight of the residual is the smallest that does.
        seed: Of the views, the samples and the initial weights, at least 0.

    Raises:
        GeometryError: a number out of its range.
    """

    steps: int = 20
    tokens: int = 256
    positions: int = 16
    views: int = 32
    held_out: int = 8
    jitter: Jitter = field(default_factory=lambda: Jitter(max_pad=20, zoom=(1.0, 1.0)))
    lr: float = 1e-3
    width: int = 128
    frequencies: int = 12
    highest: float = 3.5
    magnitude: float = 2.0
    blur: float = 0.0
    averaging_sigma: float | None = 0.3
    back_project: bool = True
    margin: float = 0.02
    seed: int = 0

    @property
    def validation_views(self) -> int:
        """How many of the ``views``, the last ones, choose the blend weight; none of a single view."""
        return min(self.views - 1, max(1, self.views // 8)) if self.back_project else 0

    @property
    def training_views(self) -> int:
        """How many of the ``views``, the first ones, the network is fitted to."""
        return self.views - self.validation_views

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 0),
            ("tokens", 1),
            ("positions", 1),
            ("views", 1),
            ("held_out", 1),
            ("width", 1),
            ("frequencies", 1),
            ("magnitude", 0),
            ("blur", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not (isfinite(value) and value >= least):
                raise GeometryError(f"implicit: {name}={value} must be at least {least}")
        if not (isfinite(self.lr) and self.lr > 0):
            raise GeometryError(f"implicit: lr={self.lr} must be positive and finite")
        if not isfinite(self.highest):
            raise GeometryError(f"implicit: highest={self.highest} must be a finite logarithm of a frequency")
        if self.averaging_sigma is not None and not (isfinite(self.averaging_sigma) and self.averaging_sigma > 0):
            raise GeometryError(
                f"implicit: averaging_sigma={self.averaging_sigma} cells must be positive, or None for single-view "
                "features"
            )
        if not 0 <= self.margin < 1:
            raise GeometryError(f"implicit: margin={self.margin} is a share of an error, at least 0 and below 1")

"""Options of the bilateral upsampler, which several jobs have."""

from dataclasses import dataclass
from typing import Any

from pipeline.options import Checked, option

__all__ = ["BilateralOptions"]


@dataclass(frozen=True, kw_only=True)
class BilateralOptions(Checked):
    """See :class:`featup.upsamplers.Bilateral`, whose defaults these are."""

    sigma_space: float = option(1.5, "bilateral: in pixels of a 2x stage", group="upsampler", above=0)
    sigma_colour: float = option(0.15, "bilateral: on RGB in [-1, 1]", group="upsampler", above=0)
    sigma_feature: float = option(
        0.6,
        "bilateral: along the image's principal components, in the root of their total variance",
        group="upsampler",
        above=0,
    )
    feature_components: int = option(
        8,
        "bilateral: principal components of the image's features that are compared beside the colours, 0 for none",
        group="upsampler",
        before=0,
        at_least=0,
        at_most=64,
    )
    same_resolution_stages: int = option(
        1,
        "bilateral: how often the coarse features are filtered at their own size before the 2x stages",
        group="upsampler",
        before=0,
        at_least=0,
        at_most=16,
    )
    sigma_coarse: float = option(
        0.5,
        "bilateral: in cells, of the filter at the features' own size; larger ones average objects and blur thin ones",
        group="upsampler",
        before=1.0,
        above=0,
    )

    @property
    def bilateral(self) -> dict[str, Any]:
        """The arguments of :class:`featup.upsamplers.Bilateral`."""
        return {
            "sigma_space": self.sigma_space,
            "sigma_colour": self.sigma_colour,
            "sigma_feature": self.sigma_feature,
            "feature_components": self.feature_components,
            "same_resolution_stages": self.same_resolution_stages,
            "sigma_coarse": self.sigma_coarse,
        }

"""Options of the upsamplers that compute features of many views of each image: multiview and implicit."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from featup.errors import GeometryError
from pipeline.config.base import LARGEST_SEED
from pipeline.options import Checked, option

if TYPE_CHECKING:
    from featup.multiview import ImplicitOptions, MultiViewOptions

__all__ = ["ImplicitPreset", "PerImageOptions"]

ImplicitPreset = Literal["fast", "paper"]
_FIT = "fit_"


@dataclass(frozen=True, kw_only=True)
class PerImageOptions(Checked):
    """How views of an image are averaged, and how a network is fitted to them."""

    view_max_pad: int = option(20, "multiview: largest shift of a view in pixels", group="upsampler", at_least=0)
    view_flips: bool = option(True, "multiview: mirror half of the views", group="upsampler")
    back_projection: bool = option(
        True,
        "multiview: add the residual between the average and the upsampled map's patch means, with a weight that "
        "held-back views choose",
        group="upsampler",
    )
    implicit_preset: ImplicitPreset = option(
        "fast",
        "implicit: paper (3000 views, 1200 steps on all patches of 10 views) or fast (100 views, the closed form of "
        "the last layer and no steps; steps asked for sample tokens and positions); the fit options below win over it",
        group="upsampler",
    )
    fit_views: int | None = option(
        None, "implicit: views of an image that it is fitted to", group="upsampler", at_least=1
    )
    fit_steps: int | None = option(None, "implicit: steps of a fit", group="upsampler", at_least=0)
    fit_step_views: int | None = option(
        None, "implicit, paper: views of a step, of which all tokens are compared", group="upsampler", at_least=1
    )
    fit_tokens: int | None = option(
        None, "implicit, fast: tokens that a step samples from all views", group="upsampler", at_least=1
    )
    fit_positions: int | None = option(
        None, "implicit, fast: positions sampled in a token's window", group="upsampler", at_least=1
    )
    fit_lr: float | None = option(None, "implicit: learning rate of NAdam", group="upsampler", above=0)
    fit_lr_decay: bool | None = option(None, "implicit: let the learning rate fall to 0", group="upsampler")
    fit_warm_start: bool | None = option(
        None, "implicit, fast: solve for the last layer before the first step", group="upsampler"
    )
    fit_components: int | None = option(
        None,
        "implicit: principal components of the features of the image's own views to fit in, without a PCA of the data "
        "set",
        group="upsampler",
        at_least=1,
    )
    fit_frequencies: int | None = option(
        None, "implicit: frequencies of each coordinate", group="upsampler", at_least=1
    )
    fit_lowest: float | None = option(
        None,
        "implicit: logarithm of the lowest frequency, on positions from -1 to 1",
        group="upsampler",
        at_least=-20,
        at_most=20,
    )
    fit_highest: float | None = option(
        None, "implicit: logarithm of the highest frequency", group="upsampler", at_least=-20, at_most=20
    )
    fit_dropout: float | None = option(
        None, "implicit: share of whole channels dropped in a step, below 1", group="upsampler", at_least=0, at_most=1
    )
    fit_kernel: int | None = option(
        None,
        "implicit: least side in pixels of the window a token attends to; by default twice the patch less three",
        group="upsampler",
        at_least=1,
    )
    fit_magnitude: float | None = option(
        None, "implicit: weight of the error of the features' norms", group="upsampler", at_least=0
    )
    fit_total_variation: float | None = option(
        None, "implicit: weight of the total variation of the norms", group="upsampler", at_least=0
    )
    fit_blur_pin: float | None = option(
        None, "implicit: weight of the map's difference from its blur", group="upsampler", at_least=0
    )
    fit_max_pad: int | None = option(
        None, "implicit: reflected border of a view in pixels", group="upsampler", at_least=0
    )
    fit_max_zoom: float | None = option(None, "implicit: largest zoom of a view", group="upsampler", at_least=1)
    fit_zoom_share: float | None = option(
        None, "implicit: share of the views that are zoomed", group="upsampler", at_least=0, at_most=1
    )
    fit_flip: bool | None = option(None, "implicit: mirror half of the views", group="upsampler")
    fit_seed: int = option(
        0,
        "multiview and implicit: seed of views, samples and initial weights",
        group="upsampler",
        at_least=0,
        at_most=LARGEST_SEED,
    )

    def _checks(self) -> Sequence[tuple[bool, str]]:
        problem = self._problem()
        return [*super()._checks(), (problem is not None, str(problem))]

    def _problem(self) -> str | None:
        try:
            self.implicit_options()
        except GeometryError as error:
            return f"{error}; change the --fit options"
        return None

    def implicit_options(self, preset: ImplicitPreset | None = None) -> "ImplicitOptions":
        """How implicit fits an image: by a preset, by default the config's, and the options that are given."""
        from featup.multiview import FAST, PAPER

        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name.startswith(_FIT)}
        changes = {name.removeprefix(_FIT): value for name, value in given.items() if value is not None}
        return replace({"fast": FAST, "paper": PAPER}[preset or self.implicit_preset], **changes)

    def multiview_options(self, views: int, held_out: int) -> "MultiViewOptions":
        """How multiview averages ``views``, with others ``held_out`` that measure the result."""
        from featup.multiview import MultiViewOptions

        return MultiViewOptions(
            views=views,
            held_out=held_out,
            max_pad=self.view_max_pad,
            flip=self.view_flips,
            back_project=self.back_projection,
            seed=self.fit_seed,
        )

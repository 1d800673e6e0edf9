"""The crop objective: upsampled features of an image must be what the backbone says of its zoomed crops.

This is how AnyUp is trained (Wimmer et al., arXiv 2510.12764), and in a like way JAFAR (arXiv 2506.11136). A crop that
fills the backbone's input has a grid of features that is finer than the image's own: these are the target. No
downsampler is needed, and at the targets' resolution an upsampler that serves any size costs little.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.training.losses import reconstruction
from featup.training.objective import Objective, Purpose, seeded
from featup.upsamplers import ChannelMap, Upsampler

__all__ = ["CropObjective"]


class CropObjective(Objective):
    """An upsampler, and its error against the features of crops: mean squared error plus cosine distance.

    The images are larger than the backbone's input by a whole factor, ``detail``. Their means over ``detail`` pixels
    are the image that is upsampled, and crops are cut from the large image, so that a zoomed crop shows details.

    A crop covers as many cells of the upsampled map as the backbone gives for it. Upsamplers for any size produce
    these cells directly. A stack of 2x stages upsamples to the image's size, so that all its stages are trained; the
    means of its cells are compared.
    """

    def __init__(
        self,
        upsampler: Upsampler,
        *,
        crops: int = 2,
        least: float = 0.5,
        detail: int = 2,
        projections: int | None = 30,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            upsampler, projections, precision: See :class:`Objective`.
            crops: Of every image in a step, at least 1; those of an image have one size.
            least: The smallest side of a crop as a share of the image's, above 0 and below 1. The largest is one cell
                less than the whole image.
            detail: Size of the images in multiples of the backbone's input, at least 1. ``1 / least`` or more shows
                the smallest crop in full detail.

        Raises:
            GeometryError: numbers out of these ranges.
        """
        super().__init__(upsampler, projections, precision)
        if crops < 1 or not 0 < least < 1 or detail < 1:
            raise GeometryError(
                f"objective: crops={crops} and detail={detail} must be at least 1, and least={least} between 0 and 1"
            )
        self.crops = crops
        self.least = least
        self.detail = detail
        self._stack = isinstance(getattr(upsampler, "stages", None), nn.ModuleList)

    def forward(self, backbone: Backbone, images: Tensor, seed: int, step: int, first: int = 0) -> dict[str, Tensor]:
        """See :meth:`Objective.forward`."""
        directions = self.directions(backbone, seeded(seed, Purpose.DIRECTIONS, step)).to(images.device)
        prediction, target = self._pair(
            backbone, images, directions, lambda place: seeded(seed, Purpose.CROPS, step, first + place)
        )
        terms = {"reconstruction": reconstruction(prediction, target), "cosine": _cosine_distance(prediction, target)}
        return {"loss": terms["reconstruction"] + terms["cosine"], **terms}

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss itself."""
        return reconstruction(prediction, target) + _cosine_distance(prediction, target)

    def held_out_pairs(
        self, backbone: Backbone, images: Tensor, directions: Tensor, seed: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`Objective.held_out_pairs`."""
        yield self._pair(
            backbone,
            images,
            directions,
            lambda place: seeded(seed, Purpose.HELD_OUT, Purpose.CROPS, first + place),
        )

    def _pair(
        self, backbone: Backbone, images: Tensor, directions: Tensor, generator: Callable[[int], torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Predicted and target features ``[B * crops, h, w, P]``; an image's crops follow from its generator."""
        planes = images.permute(0, 3, 1, 2).float()
        small = functional.avg_pool2d(planes, self.detail)
        size = (small.shape[2], small.shape[3])
        whole = _as_uint8(small)
        low = backbone.grid(size)
        coarse = self.features(backbone, backbone.normalise(whole).permute(0, 2, 3, 1))
        predictions, crops = [], []
        for place in range(len(images)):
            fine, corners = self._sample(low, generator(place))
            one = slice(place, place + 1)
            upsampled = self._upsampled(coarse[one], whole[one], fine, directions)
            for top, left in corners:
                predictions.append(upsampled[:, top : top + low[0], left : left + low[1]])
                edges = [
                    [round(at * side / cells) for at in (start, start + count)]
                    for start, count, side, cells in zip((top, left), low, planes.shape[2:], fine, strict=True)
                ]
                window = planes[one, :, slice(*edges[0]), slice(*edges[1])]
                crops.append(functional.interpolate(window, size, mode="bilinear", antialias=True))
        normalised = backbone.normalise(_as_uint8(torch.cat(crops))).permute(0, 2, 3, 1)
        return torch.cat(predictions), self.features(backbone, normalised) @ directions.T

    def _sample(
        self, low: tuple[int, int], generator: torch.Generator
    ) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Cells (height, width) of the upsampled map, of which a crop covers ``low``, and the first ones of the crops.

        The height's cells are uniform between one more than the coarse map's and ``low / least``.
        """
        most = max(low[0] + 1, round(low[0] / self.least))
        height = low[0] + 1 + int(torch.randint(most - low[0], (), generator=generator))
        fine = (height, max(low[1], round(low[1] * height / low[0])))
        corners = [
            tuple(int(torch.randint(f - c + 1, (), generator=generator)) for f, c in zip(fine, low, strict=True))
            for _ in range(self.crops)
        ]
        return fine, [(top, left) for top, left in corners]

    def _upsampled(self, coarse: Tensor, image: Tensor, fine: tuple[int, int], directions: Tensor) -> Tensor:
        """``[1, h, w, C]`` to ``[1, *fine, P]``."""
        projection = ChannelMap.without_bias(directions)
        height, width = fine
        cell = max(1, min(image.shape[1] // height, image.shape[2] // width)) if self._stack else 1
        upsampled: Tensor = self.upsampler(coarse, image, (cell * height, cell * width), projection)
        if cell == 1:
            return upsampled
        return upsampled.view(1, height, cell, width, cell, -1).mean((2, 4))


def _cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all cells of one minus the cosine, ``[..., P]`` each."""
    return 1 - functional.cosine_similarity(prediction, target, dim=-1).mean()


def _as_uint8(planes: Tensor) -> Tensor:
    """``[B, 3, H, W]`` in 0 to 255 to uint8 ``[B, H, W, 3]``."""
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

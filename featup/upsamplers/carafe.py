"""CARAFE, one of the trained upsamplers that FeatUp is compared with, and the reassembly it shares with SAPA."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import Taps, interpolation_taps, resample
from featup.upsamplers.base import ChannelMap, as_guidance, row_bands
from featup.upsamplers.joint import resize_guidance
from featup.upsamplers.learned import LearnedUpsampler

__all__ = ["CARAFE"]


class Reassembly(LearnedUpsampler):
    """Stages that double the map: each new vector is a weighted mean of the window around its parent.

    The four children of a low-resolution position share its window, so a stage is four adaptive convolutions of the
    low-resolution map, one per child, and nothing is unfolded. A stage that must end short of a doubling interpolates
    the doubled map to its size, bilinearly, band by band. The map goes on beyond its border with its outermost values,
    so that a constant map stays constant.
    """

    radius = 2
    taps = (2 * radius + 1) ** 2

    def __init__(self, channels: int, width: int, tile_pixels: int | None) -> None:
        super().__init__(channels, tile_pixels)
        self.width = width
        self.compress = nn.Linear(channels, width)
        self.stages: nn.ModuleList

    def mapped_bands(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_bands`. The last stage's map is never whole, only the smaller ones before it."""
        sizes = self.stages_to(features, size, len(self.stages))
        guidance = as_guidance(guidance, features.dtype)
        compressed = self.compress(features)
        values = features if total is None else functional.linear(features, total.weight)
        for stage, stage_size in enumerate(sizes[:-1]):
            bands = self._stage_bands(stage, compressed, [values, compressed], guidance, stage_size)
            values, compressed = (torch.cat(parts, 1) for parts in zip(*(maps for _, maps in bands), strict=True))
        if sizes:
            last = self._stage_bands(len(sizes) - 1, compressed, [values], guidance, size)
        else:
            # No stage to run: this may be the caller's own tensor, which must not be written to.
            last = iter([(slice(0, size[0]), [values.clone()])])
        for rows, (band,) in last:
            yield rows, band if total is None else band + total.bias

    def _stage_bands(
        self, stage: int, compressed: Tensor, maps: Sequence[Tensor], guidance: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """The rows and, for each of ``maps``, what the stage puts in them."""
        _, height, width, _ = compressed.shape
        reach = self.radius
        down, across = (_beyond(side, reach) for side in (height, width))
        image = resize_guidance(guidance, (2 * height, 2 * width))
        image = resample(image, _beyond(2 * height, 1), _beyond(2 * width, 1))
        doubles = size == (2 * height, 2 * width)
        down_fine = interpolation_taps("bilinear", 2 * height, size[0])
        across_fine = interpolation_taps("bilinear", 2 * width, size[1])
        for rows in row_bands(size, self.tile_pixels, compressed.device):
            # From the rows asked for to those of the doubled map they are made of, and to the parents of these.
            fine = down_fine[rows]
            needed = fine.index[fine.weight != 0]
            first, stop = int(needed.min()) // 2, int(needed.max()) // 2 + 1
            halo = down[first : stop + 2 * reach]
            logits = self.stages[stage](
                resample(compressed, halo, across), image[:, 2 * first : 2 * stop + 2], stop - first, width
            )
            kernels = logits.softmax(-1).unflatten(-1, (2 * reach + 1, 2 * reach + 1))
            children = [_children(resample(one, halo, across), kernels) for one in maps]
            if doubles:
                within = slice(rows.start - 2 * first, rows.stop - 2 * first)
                yield rows, [one[:, within] for one in children]
            else:
                # A tap of no weight may lie in the row after the last that is needed.
                index = (fine.index - 2 * first).clamp(max=2 * (stop - first) - 1)
                fine = Taps(index, fine.weight, 2 * (stop - first))
                yield rows, [resample(one, fine, across_fine) for one in children]


class _CARAFEStage(nn.Module):
    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.encode = nn.Conv2d(width, 4 * taps, 3)
        nn.init.normal_(self.encode.weight, std=0.001)
        # Untrained, a child's kernel is a narrow Gaussian where the child is, 1/4 off its parent's centre.
        reach = (int(taps**0.5) - 1) // 2
        window = torch.arange(-reach, reach + 1.0)
        falloff = -(window - torch.tensor([[-0.25], [0.25]])).square() / (2 * 0.5**2)
        with torch.no_grad():
            self.encode.bias.copy_((falloff[:, None, :, None] + falloff[None, :, None, :]).flatten())  # type: ignore[union-attr]

    def forward(self, compressed: Tensor, image: Tensor, height: int, width: int) -> Tensor:
        """Logits ``[1, h, w, 2, 2, taps]`` from ``[1, h + 4, w + 4, width]``; the image is not looked at."""
        logits = self.encode(compressed[:, 1:-1, 1:-1].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return logits.view(1, height, width, 2, 2, -1)  # type: ignore[no-any-return]


class CARAFE(Reassembly):
    """Content-aware reassembly of features (Wang et al., ICCV 2019, arXiv 1905.02188), once per doubling.

    The features, compressed to ``width`` channels, go through a 3x3 convolution that gives the logits of the
    5x5 kernels of each position's four children; softmax makes kernels of them. All stages share the compression.
    Untrained, the kernels are Gaussians about the children's places: a smooth interpolation. Blind to the image.
    """

    name = "carafe"

    def __init__(self, channels: int, stages: int = 4, width: int = 64, tile_pixels: int | None = None) -> None:
        """
        Args:
            channels: Of the features it is made for.
            stages: Most doublings it can serve: 4 for stride 16.
            width: Channels of the compressed features.
            tile_pixels: Most output positions whose kernels are held at once, by default chosen for the device.
        """
        super().__init__(channels, width, tile_pixels)
        self.stages = nn.ModuleList(_CARAFEStage(width, self.taps) for _ in range(stages))


def _beyond(size: int, reach: int) -> Taps:
    """Taps that copy an axis and repeat its ends ``reach`` times."""
    index = torch.arange(-reach, size + reach).clamp(0, size - 1)[:, None]
    return Taps(index, torch.ones(index.shape), size)


def _children(padded: Tensor, kernels: Tensor) -> Tensor:
    """``[1, h + 2r, w + 2r, C]`` and ``[1, h, w, 2, 2, 2r + 1, 2r + 1]`` to the doubled map ``[1, 2h, 2w, C]``."""
    rows = [
        torch.stack([adaptive_conv(padded, kernels[:, :, :, i, j]) for j in range(2)], 3).flatten(2, 3)
        for i in range(2)
    ]
    return torch.stack(rows, 2).flatten(1, 2)

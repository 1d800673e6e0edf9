"""The learned and fitted upsamplers that FeatUp is compared with (FeatUp, section 4).

None of them makes all ``C`` channels at high resolution when a projection asks for fewer. :class:`CARAFE` and
:class:`SAPA` are linear over space once their kernels are known, and need a compression of the features to know them;
that compression is upsampled along with the values, by the same kernels, which is the same as compressing the
upsampled features, because the kernels sum to one. :class:`ResizeConv`, :class:`IFA` and :class:`DeepImagePrior` end
in a linear layer that makes the channels out of a narrow map, and a projection folds into that layer.
"""

from collections.abc import Iterator, Sequence
from math import pi
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.adaptive_conv import adaptive_conv
from featup.kernels.resample import Taps, interpolation_taps, resample
from featup.kernels.window_correlation import window_correlation
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, row_bands, stage_sizes
from featup.upsamplers.joint import resize_guidance

__all__ = ["CARAFE", "IFA", "SAPA", "DeepImagePrior", "Drive", "ResizeConv"]

Drive = Literal["image", "noise"]


class _Learned(Upsampler):
    """What the trained baselines share: made for so many channels."""

    def __init__(self, channels: int, tile_pixels: int | None) -> None:
        super().__init__()
        self.channels = channels
        self.tile_pixels = tile_pixels

    def mixing(self, channels: int) -> None:
        """None: the channels are mixed before the end. Raises GeometryError for other features than trained for."""
        if channels != self.channels:
            raise GeometryError(
                f"{self.name}: made for {self.channels} channels, got features of {channels}; "
                "use one trained for this backbone and layer"
            )

    def stages_to(self, low: Tensor, size: tuple[int, int], have: int) -> Sequence[tuple[int, int]]:
        """Sizes after each stage; raises GeometryError where that takes more stages than there are."""
        start = (low.shape[1], low.shape[2])
        sizes = stage_sizes(start, size)
        if len(sizes) > have:
            raise GeometryError(
                f"{self.name}: {start} to {size} (height, width) takes {len(sizes)} doublings and there are {have} "
                f"stages; ask for at most {tuple(side << have for side in start)}, or train with more stages"
            )
        return sizes


class _ResizeStage(nn.Module):
    """The convolution after one interpolation, as a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3)
        self.mix = nn.Linear(width, width)

    def forward(self, padded: Tensor) -> Tensor:
        """``[1, H + 2, W + 2, width]``, interpolated and padded, to ``[1, H, W, width]``."""
        found = self.spread(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed: Tensor = self.mix(functional.gelu(found))
        return padded[:, 1:-1, 1:-1] + mixed


class ResizeConv(_Learned):
    """Resize-convolution (Odena et al., Deconvolution and Checkerboard Artifacts, 2016): interpolate, then convolve.

    The channels are mixed where that is cheap. A 3x3 convolution of 512 channels at 224x224 is 118 G multiply-adds
    an image, so a narrow map goes through the stages, made from the features at low resolution: each stage
    interpolates it bilinearly to twice its size and adds a 3x3 convolution of it, all ``width`` channels to all. Its
    end is a linear layer to ``C`` channels, added to the bilinear interpolation of the features. That layer starts at
    zero, so that untrained this is exactly the bilinear interpolation. Blind to the image.
    """

    name = "resize_conv"

    def __init__(self, channels: int, stages: int = 4, width: int = 64, tile_pixels: int | None = None) -> None:
        """
        Args:
            channels: Of the features it is made for.
            stages: Most doublings it can serve: 4 for stride 16.
            width: Channels of the narrow map.
            tile_pixels: Most output positions in the works at once, by default chosen for the device.
        """
        super().__init__(channels, tile_pixels)
        self.width = width
        self.compress = nn.Linear(channels, width)
        self.stages = nn.ModuleList(_ResizeStage(width) for _ in range(stages))
        self.expand = nn.Linear(width, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def mapped_bands(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_bands`. The last stage's map is never whole, only the smaller ones before it."""
        sizes = self.stages_to(features, size, len(self.stages))
        narrow = self.compress(features)
        for stage, stage_size in enumerate(sizes[:-1]):
            narrow = torch.cat([band for _, band in self._stage_bands(stage, narrow, stage_size)], 1)
        last = self._stage_bands(len(sizes) - 1, narrow, size) if sizes else iter([(slice(0, size[0]), narrow)])
        values = features if total is None else functional.linear(features, total.weight)
        end = _ending(self.expand, total)
        down = interpolation_taps("bilinear", features.shape[1], size[0])
        across = interpolation_taps("bilinear", features.shape[2], size[1])
        for rows, band in last:
            yield rows, resample(values, down[rows], across) + functional.linear(band, end.weight, end.bias)

    def _stage_bands(self, stage: int, narrow: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        down = interpolation_taps("bilinear", narrow.shape[1], size[0], reflect=1)
        across = interpolation_taps("bilinear", narrow.shape[2], size[1], reflect=1)
        for rows in row_bands(size, self.tile_pixels, narrow.device):
            yield rows, self.stages[stage](resample(narrow, down[rows.start : rows.stop + 2], across))


class _Reassembly(_Learned):
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


class CARAFE(_Reassembly):
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


class _SAPAStage(nn.Module):
    def __init__(self, width: int, key_dim: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Conv2d(3, key_dim, 3), nn.GELU(), nn.Conv2d(key_dim, key_dim, 1))
        # Without biases: what is added to all keys of a window alike, the softmax cancels.
        self.key = nn.Sequential(nn.LayerNorm(width, bias=False), nn.Linear(width, key_dim, bias=False))
        self.scale = key_dim**-0.5

    def forward(self, compressed: Tensor, image: Tensor, height: int, width: int) -> Tensor:
        """Logits ``[1, h, w, 2, 2, taps]`` from ``[1, h + 4, w + 4, width]`` and ``[1, 2h + 2, 2w + 2, 3]``."""
        query = self.query(image.permute(0, 3, 1, 2) * 2 - 1).permute(0, 2, 3, 1) * self.scale
        keys = self.key(compressed)
        logits = [
            window_correlation(query[:, i::2, j::2].contiguous(), keys).flatten(-2) for i in range(2) for j in range(2)
        ]
        return torch.stack(logits, 3).view(1, height, width, 2, 2, -1)


class SAPA(_Reassembly):
    """Similarity-aware point affiliation (Lu et al., NeurIPS 2022, arXiv 2209.12866), once per doubling.

    The logits of a child's 5x5 kernel are the similarities of the image around it, embedded by two small convolutions,
    to the embedded features of its parent's window. Of the original's encoder features, only the image is at hand here.
    Untrained, the kernels are near to uniform.
    """

    name = "sapa"

    def __init__(
        self,
        channels: int,
        stages: int = 4,
        width: int = 64,
        key_dim: int = 32,
        tile_pixels: int | None = None,
    ) -> None:
        """
        Args:
            channels: Of the features it is made for.
            stages: Most doublings it can serve: 4 for stride 16.
            width: Channels of the compressed features, which all stages share.
            key_dim: Channels that the similarity is taken over.
            tile_pixels: Most output positions whose kernels are held at once, by default chosen for the device.
        """
        super().__init__(channels, width, tile_pixels)
        self.key_dim = key_dim
        self.stages = nn.ModuleList(_SAPAStage(width, key_dim) for _ in range(stages))


class IFA(_Learned):
    """Implicit feature alignment (Hu et al., ECCV 2022, arXiv 2206.08655): a network of coordinates, at any size.

    At each position, a perceptron takes each of the four nearest features together with the offset to it, encoded
    by sines and cosines, and the four answers are averaged with bilinear weights (the local ensemble). The first layer
    acts on the features at low resolution and the last one, linear, after the average, which changes nothing. The
    average is added to the bilinear interpolation; the last layer starts at zero, so that untrained this is exactly
    the bilinear interpolation. Blind to the image.
    """

    name = "ifa"
    frequencies = 4

    def __init__(self, channels: int, width: int = 64, tile_pixels: int | None = None) -> None:
        """
        Args:
            channels: Of the features it is made for.
            width: Of the perceptron's two hidden layers.
            tile_pixels: Most output positions in the works at once, by default chosen for the device.
        """
        super().__init__(channels, tile_pixels)
        self.width = width
        self.from_features = nn.Linear(channels, width)
        self.from_offset = nn.ModuleList(nn.Linear(1 + 2 * self.frequencies, width, bias=False) for _ in range(2))
        self.hidden = nn.Linear(width, width)
        self.expand = nn.Linear(width, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def mapped_bands(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_bands`."""
        low = self.from_features(features)
        values = features if total is None else functional.linear(features, total.weight)
        end = _ending(self.expand, total)
        down = interpolation_taps("bilinear", features.shape[1], size[0]).to(features)
        across = interpolation_taps("bilinear", features.shape[2], size[1]).to(features)
        offset_y, offset_x = (
            layer(self._encode(_offsets(taps))) for layer, taps in zip(self.from_offset, (down, across), strict=True)
        )
        for rows in row_bands(size, self.tile_pixels, features.device):
            ensemble = torch.zeros((), dtype=features.dtype, device=features.device)
            for i in range(2):
                beside = low.index_select(1, down.index[rows, i]) + offset_y[rows, i, None]
                for j in range(2):
                    corner = beside.index_select(2, across.index[:, j]) + offset_x[:, j]
                    answer = functional.gelu(self.hidden(functional.gelu(corner)))
                    weight = down.weight[rows, i, None] * across.weight[:, j]
                    ensemble = ensemble + weight[..., None] * answer
            yield rows, resample(values, down[rows], across) + functional.linear(ensemble, end.weight, end.bias)

    def _encode(self, offsets: Tensor) -> Tensor:
        """``[N, 2]`` in features, to ``[N, 2, 1 + 2 * frequencies]``."""
        octaves = 2.0 ** torch.arange(self.frequencies, dtype=offsets.dtype, device=offsets.device)
        angles = offsets[..., None] * octaves * pi
        return torch.cat([offsets[..., None], angles.sin(), angles.cos()], -1)


class DeepImagePrior(Upsampler):
    """Deep image prior (Ulyanov et al., CVPR 2018, arXiv 1711.10925): fitted to each image, nothing is trained.

    A small convolutional encoder-decoder, driven by the image or by noise, is fitted from its random start so that
    the means of its output over each feature's cell are the features. A mean commutes with the last, linear layer,
    so the fit never makes the channels at high resolution. No gradient comes back from the result, and a projection
    is applied after a fit to all channels: project the features beforehand for a cheaper fit.
    """

    name = "deep_image_prior"

    def __init__(
        self, steps: int = 300, lr: float = 0.01, drive: Drive = "image", width: int = 32, seed: int = 0
    ) -> None:
        """
        Args:
            steps: Of Adam, an image.
            lr: Adam's.
            drive: What goes into the network: the ``image``, or ``noise`` as in the original.
            width: Channels of the network, a multiple of 4.
            seed: Of its weights and of the noise, the same for every image; the global generators stay as they are.

        Raises:
            GeometryError: fewer than one step, a width that is not a multiple of 4, or an unknown drive.
        """
        super().__init__()
        if steps < 1 or width < 4 or width % 4 or drive not in get_args(Drive):
            raise GeometryError(
                f"{self.name}: steps={steps} must be at least 1, width={width} a multiple of 4, and drive={drive!r} "
                f"one of {', '.join(get_args(Drive))}"
            )
        self.steps = steps
        self.lr = lr
        self.drive = drive
        self.width = width
        self.seed = seed

    def mapped_bands(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_bands`."""
        # Also within inference_mode, whose tensors take no part in a fit: hence the copies.
        with torch.inference_mode(False), torch.enable_grad():
            hidden, end = self._fit(features.detach().clone(), guidance.detach().clone(), size)
        end = end if total is None else ChannelMap(total.weight.detach(), total.bias.detach()).after(end)
        for rows in row_bands(size, None, features.device):
            yield rows, functional.linear(hidden[:, rows], end.weight, end.bias)

    def _fit(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> tuple[Tensor, ChannelMap]:
        """The network's last hidden map ``[1, H', W', width]``, and the channel map from there to the features."""
        # One scale for all, so that the step size suits features of any magnitude.
        mean = features.mean((0, 1, 2))
        scale = (features - mean).square().mean().sqrt().clamp_min(1e-12)
        target = (features - mean) / scale
        if self.drive == "image":
            drive = resize_guidance(as_guidance(guidance, features.dtype), size).permute(0, 3, 1, 2) * 2 - 1
        else:
            generator = torch.Generator().manual_seed(self.seed)
            drive = torch.randn(1, self.width, *size, generator=generator).to(features)
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator is the only one that is put back afterwards, so it alone is seeded.
            torch.default_generator.manual_seed(self.seed)
            body = _Hourglass(drive.shape[1], self.width)
            head = nn.Linear(self.width, features.shape[3])
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        body, head = body.to(features), head.to(features)
        optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=self.lr)
        for _ in range(self.steps):
            means = functional.adaptive_avg_pool2d(body(drive), (features.shape[1], features.shape[2]))
            loss = functional.mse_loss(head(means.permute(0, 2, 3, 1)), target)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            end = ChannelMap(head.weight * scale, head.bias * scale + mean)
            return body(drive).permute(0, 2, 3, 1), end


class _Hourglass(nn.Module):
    """Three halvings and back, with what each halving lost added again: ``[1, C, H, W]`` to ``[1, width, H, W]``."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = self._block(channels, width, 1)
        self.down = nn.ModuleList(self._block(width, width, 2) for _ in range(3))
        self.up = nn.ModuleList(self._block(width, width, 1) for _ in range(3))

    @staticmethod
    def _block(channels: int, width: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(4, width), nn.GELU())

    def forward(self, drive: Tensor) -> Tensor:
        maps: list[Tensor] = [self.first(drive)]
        for down in self.down:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up in self.up:
            finer = maps.pop()
            x = up(functional.interpolate(x, finer.shape[2:], mode="bilinear", align_corners=False) + finer)
        return x


def _ending(layer: nn.Linear, total: ChannelMap | None) -> ChannelMap:
    """A last layer and then ``total``, as one channel map."""
    last = ChannelMap(layer.weight, layer.bias)
    return last if total is None else total.after(last)


def _offsets(taps: Taps) -> Tensor:
    """From each position to the two that its bilinear ``taps`` read: ``[N, 2]``, in positions of the axis they read."""
    centres = (torch.arange(len(taps), dtype=taps.weight.dtype, device=taps.weight.device) + 0.5) * (
        taps.size / len(taps)
    ) - 0.5
    return centres[:, None] - taps.index


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

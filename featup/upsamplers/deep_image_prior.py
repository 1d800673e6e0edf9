"""The deep image prior: a network fitted to each image (Ulyanov et al., CVPR 2018).

A baseline of FeatUp (section 4).
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.errors import GeometryError
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, row_slices
from featup.upsamplers.joint import resize_guidance

__all__ = ["DeepImagePrior", "Drive"]


Drive = Literal["image", "noise"]


class DeepImagePrior(Upsampler):
    """Deep image prior (arXiv 1711.10925): fitted to each image, without training.

    A small convolutional encoder-decoder takes the image, or noise, as input. From random weights it is fitted until
    the means of its output over each feature's cell match the features. The mean commutes with the last, linear layer,
    so the fit never computes the channels at high resolution. The result carries no gradient. A projection is applied
    after a fit to all channels: a fit to projected features is cheaper.
    """

    name = "deep_image_prior"

    def __init__(
        self, steps: int = 300, lr: float = 0.01, drive: Drive = "image", width: int = 32, seed: int = 0
    ) -> None:
        """
        Args:
            steps: Steps of Adam for an image, at least 1.
            lr: Learning rate of Adam.
            drive: The network's input: the ``image``, or ``noise`` as in the original.
            width: Channels of the network, a multiple of 4.
            seed: Of its weights and of the noise, the same for every image; the global generators are left alone.

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

    def mapped_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :meth:`Upsampler.mapped_row_tiles`."""
        # The copies are no inference tensors, with which autograd could not fit.
        with torch.inference_mode(False), torch.enable_grad():
            hidden, last = self._fit(features.detach().clone(), guidance.detach().clone(), size)
        if channel_map is not None:
            last = ChannelMap(channel_map.weight.detach(), channel_map.bias.detach()).after(last)
        for rows in row_slices(size, None, features.device):
            yield rows, functional.linear(hidden[:, rows], last.weight, last.bias)

    def _fit(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> tuple[Tensor, ChannelMap]:
        """The network's last hidden map ``[1, H', W', width]``, and the channel map from it to the features."""
        # All channels have one scale, so that the learning rate suits features of any magnitude.
        mean = features.mean((0, 1, 2))
        scale = (features - mean).square().mean().sqrt().clamp_min(1e-12)
        target = (features - mean) / scale
        if self.drive == "image":
            drive = resize_guidance(as_guidance(guidance, features.dtype), size).permute(0, 3, 1, 2) * 2 - 1
        else:
            generator = torch.Generator().manual_seed(self.seed)
            drive = torch.randn(1, self.width, *size, generator=generator).to(features)
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's generator is restored afterwards, so only this generator is seeded.
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
            last = ChannelMap(head.weight * scale, head.bias * scale + mean)
            return body(drive).permute(0, 2, 3, 1), last


class _Hourglass(nn.Module):
    """Three halvings and back, with skip connections: ``[1, C, H, W]`` to ``[1, width, H, W]``."""

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

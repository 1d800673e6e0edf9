"""Upsamplers with random weights, and a scene for the trained baselines."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from featup.upsamplers import CARAFE, IFA, JBU, SAPA, ResizeConv, Upsampler
from tests.featup.support import CHANNELS

LEARNED: dict[str, Callable[..., Any]] = {"resize_conv": ResizeConv, "carafe": CARAFE, "sapa": SAPA, "ifa": IFA}


def random_jbu(channels: int = CHANNELS, seed: int = 0, **options: Any) -> JBU:
    """A stack whose every parameter matters: wide keys, sharp softmax, a correction that is not small."""
    jbu = JBU(channels, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in jbu.named_parameters():
            gaussian = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() == 0 else 1 / math.sqrt(parameter.shape[-1])
            parameter.copy_(gaussian * scale + (0.8 if name.endswith("sigma_spatial") else 0.0))
    return jbu.eval()


def randomised(upsampler: Upsampler, seed: int = 0) -> Any:
    """The upsampler with random parameters, so that those that are initialised to zero matter too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in upsampler.parameters():
            fan_in = math.prod(parameter.shape[1:])
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / math.sqrt(fan_in))
    return upsampler


def learned(name: str, channels: int = CHANNELS, **options: Any) -> Any:
    """A trained baseline with random weights."""
    return randomised(LEARNED[name](channels, **options)).requires_grad_(False)


def discs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of discs ``[B, 28, 36, 3]`` and features that follow their edges ``[B, 28, 36, CHANNELS]``."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(36.0), indexing="ij")
    inside = torch.zeros(count, 28, 36)
    for mask in inside:
        for _ in range(3):
            cy, cx, radius = (torch.rand(3, generator=generator) * torch.tensor([28, 36, 5])).tolist()
            mask[(y - cy) ** 2 + (x - cx) ** 2 < (radius + 4) ** 2] = 1
    image = torch.stack([inside, 0.5 * inside, 1 - inside], -1)
    direction = torch.linspace(-1, 1, CHANNELS)
    return image, inside[..., None] * direction

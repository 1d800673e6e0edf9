"""Upsamplers from coarse features and an image to features at any size, behind one protocol.

The protocol is :class:`Upsampler`; there is a file for each method, and two functions that create them by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from featup.errors import GeometryError
from featup.names import PublishedName, TrainableName, UpsamplerName
from featup.upsamplers.anyup import AnyUp
from featup.upsamplers.base import ChannelMap, Upsampler
from featup.upsamplers.bilateral import Bilateral
from featup.upsamplers.carafe import CARAFE
from featup.upsamplers.deep_image_prior import DeepImagePrior
from featup.upsamplers.guided_filter import GuidedFilter
from featup.upsamplers.ifa import IFA
from featup.upsamplers.interpolate import Interpolate
from featup.upsamplers.jbu import JBU
from featup.upsamplers.norm_bilinear import NormBilinear
from featup.upsamplers.resize_conv import ResizeConv
from featup.upsamplers.sapa import SAPA

__all__ = [
    "CARAFE",
    "IFA",
    "JBU",
    "SAPA",
    "AnyUp",
    "Bilateral",
    "ChannelMap",
    "DeepImagePrior",
    "GuidedFilter",
    "Interpolate",
    "NormBilinear",
    "ResizeConv",
    "TrainableName",
    "Upsampler",
    "UpsamplerName",
    "create_trainable",
    "create_upsampler",
]


def create_upsampler(
    name: UpsamplerName,
    *,
    channels: int,
    checkpoint: str | Path | None = None,
    bilateral: Mapping[str, Any] | None = None,
) -> Upsampler:
    """Create an upsampler for inference.

    Args:
        channels: Of the backbone's features.
        checkpoint: For the trained methods: our safetensors file, or for ``jbu`` an official FeatUp ``.ckpt``. For
            ``anyup``: our file, or an official state dict; by default the published one, downloaded and cached.
        bilateral: Arguments of :class:`Bilateral`, for ``bilateral``; by default its own.

    Raises:
        GeometryError: an unknown name, no checkpoint where one is needed, or one for another number of channels.
        WeightsError: a checkpoint that cannot be read, or be downloaded.
    """
    match name:
        case "nearest" | "bilinear" | "bicubic":
            upsampler: Upsampler = Interpolate(name)
        case "norm_bilinear":
            upsampler = NormBilinear()
        case "guided_filter":
            upsampler = GuidedFilter()
        case "bilateral":
            upsampler = Bilateral(**bilateral or {})
        case "anyup":
            from featup.checkpoints import load_anyup
            from featup.published import checkpoint_file

            file = checkpoint_file(name, checkpoint)
            assert file is not None
            upsampler = load_anyup(file)
        case "jbu" | "resize_conv" | "carafe" | "sapa" | "ifa":
            if checkpoint is None:
                raise GeometryError(
                    f"{name} needs a trained checkpoint and none was given. Most backbones have no published "
                    "checkpoint: train an upsampler, give the file of one, or use 'bilateral', which needs no training"
                )
            from featup.checkpoints import load_upsampler

            upsampler = load_upsampler(checkpoint, name)
            upsampler.output_projection(channels)  # Raises for other channels.
        case _:
            raise GeometryError(f"unknown upsampler {name!r}; there are {', '.join(get_args(UpsamplerName))}")
    return upsampler.eval().requires_grad_(False)


def create_trainable(
    name: TrainableName | PublishedName, channels: int, *, stages: int = 4, width: int | None = None
) -> Upsampler:
    """Create an upsampler for training, with initial weights from torch's global generator.

    Args:
        channels: Of the backbone's features; ``anyup`` serves any number of them.
        stages: Number of 2x stages, for all but ``ifa`` and ``anyup``, which serve any size.
        width: Channels of the hidden maps, of ``jbu`` and ``anyup`` the keys; by default the upsampler's own.

    Raises:
        GeometryError: an unknown name, or a width that ``anyup`` cannot divide.
    """
    hidden = {} if width is None else {"width": width}
    match name:
        case "jbu":
            return JBU(channels, stages) if width is None else JBU(channels, stages, width)
        case "resize_conv":
            return ResizeConv(channels, stages, **hidden)
        case "carafe":
            return CARAFE(channels, stages, **hidden)
        case "sapa":
            return SAPA(channels, stages, **hidden)
        case "ifa":
            return IFA(channels, **hidden)
        case "anyup":
            return AnyUp(**hidden)
        case _:
            names = (*get_args(TrainableName), *get_args(PublishedName))
            raise GeometryError(f"no upsampler {name!r} to train; there are {', '.join(names)}")

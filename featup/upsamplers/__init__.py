"""Upsamplers from coarse features and an image to features at any size, behind one protocol.

The protocol is :class:`Upsampler`; there is a file for each method, and two functions that create them by name.
"""

from pathlib import Path
from typing import get_args

from featup.errors import GeometryError
from featup.kernels.resample import BICUBIC_A
from featup.names import RangeKernel, TrainableName, UpsamplerName
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
    "RangeKernel",
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
    sigma_space: float = 1.0,
    sigma_colour: float = 0.2,
) -> Upsampler:
    """Create an upsampler for inference.

    Args:
        channels: Of the backbone's features.
        checkpoint: For the trained methods: our safetensors file, or for ``jbu`` an official FeatUp ``.ckpt``. For
            ``anyup``: an official state dict; by default the published one, downloaded and cached.
        sigma_space, sigma_colour: For ``bilateral``; see :class:`Bilateral`.

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
            upsampler = Bilateral(sigma_space, sigma_colour)
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
    name: TrainableName,
    channels: int,
    kernel: RangeKernel = "distance",
    initial_sigmas: tuple[float, float] = (3.0, 0.1),
    affinity_channels: int = 0,
    same_resolution_stages: int = 0,
    bicubic_a: float = BICUBIC_A,
) -> Upsampler:
    """Create an upsampler for training, with initial weights from torch's global generator.

    Args:
        channels: Of the backbone's features.
        kernel, initial_sigmas, affinity_channels, same_resolution_stages, bicubic_a: For ``jbu``; see
            :class:`featup.upsamplers.jbu.JBU`.

    Raises:
        GeometryError: an unknown name.
    """
    match name:
        case "jbu":
            if kernel == "distance":
                return JBU(
                    channels,
                    kernel=kernel,
                    initial_sigmas=initial_sigmas,
                    affinity_channels=affinity_channels,
                    same_resolution_stages=same_resolution_stages,
                    bicubic_a=bicubic_a,
                    guidance_mean=(0.5,) * 3,
                    guidance_std=(0.5,) * 3,
                )
            return JBU(channels)
        case "resize_conv":
            return ResizeConv(channels)
        case "carafe":
            return CARAFE(channels)
        case "sapa":
            return SAPA(channels)
        case "ifa":
            return IFA(channels)
        case _:
            raise GeometryError(f"no upsampler {name!r} to train; there are {', '.join(get_args(TrainableName))}")

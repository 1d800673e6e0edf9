"""What the options of a training run name: its backbones, and the objective with its initial weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from featup.backbones import Backbone
from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.multiview.views import Jitter
from featup.training.crops import CropObjective
from featup.training.multi_view import LogSigma, MultiViewObjective
from featup.training.objective import Objective, seeded
from featup.upsamplers import Interpolate, Upsampler, create_trainable
from featup.upsamplers.base import stage_sizes
from pipeline.compute.models import make_backbone
from pipeline.config.train import TrainConfig

__all__ = ["create_baseline", "create_objective", "describe_backbones", "make_backbones"]

# Purpose of torch's own generator; featup.training has smaller numbers for the purposes of the others.
_WEIGHTS = 100


def make_backbones(config: TrainConfig) -> list[Backbone]:
    """The backbone, and after it those of ``also_backbones``, on the CPU.

    Raises:
        FeatupError: a model, layer, size or weights that do not fit.
    """
    others = []
    for text in config.also_backbones:
        name, _, weights = text.partition("=")
        plain: dict[str, Any] = {"layer": -1, "stride": None, "backbone_kwargs": {}, "mean": None, "std": None}
        others.append(make_backbone(replace(config, backbone=name, weights=weights or None, **plain)))
    return [make_backbone(config), *others]


def describe_backbones(config: TrainConfig, backbones: Sequence[Backbone]) -> list[dict[str, Any]]:
    """The backbones' names, weights and maps for images of this size, as a run records them."""
    return [
        {
            "name": backbone.name,
            "layer": backbone.layer,
            "channels": backbone.channels,
            "stride": list(backbone.stride),
            "grid": list(backbone.grid(config.size)),
            "norm": backbone.norm,
            "digest": backbone.digest,
        }
        for backbone in backbones
    ]


def create_objective(config: TrainConfig, backbone: Backbone) -> Objective:
    """The modules to train, on the CPU, with the initial weights of the seed."""
    torch.manual_seed(seeded(config.seed, _WEIGHTS).initial_seed())
    stages = config.stages or max(1, len(stage_sizes(backbone.grid(config.size), config.size)))
    upsampler = create_trainable(config.upsampler, backbone.channels, stages=stages, width=config.width)
    if config.objective == "crops":
        return _crops(config, upsampler)
    downsampler: AttentionDownsampler | BlurDownsampler
    if config.downsampler == "attention":
        downsampler = AttentionDownsampler(backbone.channels, backbone.stride, backbone.stride)
        downsampler.perturb_taps()
    else:
        downsampler = BlurDownsampler(backbone.stride, backbone.stride)
    return MultiViewObjective(
        upsampler,
        downsampler,
        jitter=Jitter(config.max_pad, (1.0, config.max_zoom)),
        jitters=config.jitters,
        projections=config.projections,
        uncertainty=LogSigma(backbone.channels) if config.uncertainty else None,
        crf=config.crf,
        crf_positions=config.crf_positions,
        total_variation=config.total_variation,
        magnitude=config.magnitude,
        precision=getattr(torch, config.precision),
    )


def create_baseline(config: TrainConfig, backbone: Backbone) -> Objective:
    """Bilinear interpolation under the same objective; for views, the downsampler is the mean over each patch."""
    if config.objective == "crops":
        return _crops(config, Interpolate("bilinear"))
    return MultiViewObjective(
        Interpolate("bilinear"),
        BlurDownsampler(backbone.stride, backbone.stride),
        jitter=Jitter(config.max_pad, (1.0, config.max_zoom)),
        jitters=config.jitters,
        projections=config.projections,
        precision=getattr(torch, config.precision),
    )


def _crops(config: TrainConfig, upsampler: Upsampler) -> CropObjective:
    return CropObjective(
        upsampler,
        crops=config.jitters,
        least=config.least_crop,
        detail=config.crop_detail,
        projections=config.projections,
        precision=getattr(torch, config.precision),
    )

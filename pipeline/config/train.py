"""Options of ``featup train``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from featup.names import PublishedName, TrainableName
from pipeline.config.base import LARGEST_SEED, InputConfig, whole_gpus
from pipeline.inputs import storage
from pipeline.options import option

__all__ = ["TrainConfig"]

# What a preset says where an option is not given.
_PRESETS: dict[str, dict[str, int]] = {
    "fast": {"jitters": 2, "batch_size": 2, "steps": 400},
    "paper": {"jitters": 5, "batch_size": 4, "steps": 2000},
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(InputConfig):
    """Options of ``featup train``: shards of images in, a trained upsampler out."""

    upsampler: TrainableName | PublishedName = option(
        "jbu", "the upsampler to train: jbu, resize_conv, carafe, sapa, ifa or anyup", group="upsampler"
    )
    stages: int | None = option(
        None,
        "2x stages of all but ifa and anyup; by default as many as the backbone's stride and the size ask for, 4 for "
        "stride 16",
        group="upsampler",
        at_least=1,
        at_most=8,
    )
    width: int | None = option(
        None,
        "channels of the hidden maps, of jbu and anyup the keys; by default the upsampler's own (32 for jbu, 128 for "
        "anyup)",
        group="upsampler",
        at_least=1,
        at_most=1024,
    )
    also_backbones: tuple[str, ...] = option(
        (),
        "more backbones for anyup by crops, NAME or NAME=WEIGHTS, each with its last map; the steps take turns",
        group="upsampler",
        run=True,
    )

    preset: Literal["fast", "paper"] = option(
        "fast",
        "the numbers whose default is named as that of a preset: fast (minutes on a CPU) or paper (FeatUp's own)",
        group="training",
    )
    objective: Literal["views", "crops"] = option(
        "views",
        "what upsampled features must explain: views (FeatUp: jittered views, downsampled) or crops (AnyUp: the "
        "backbone's features of zoomed crops)",
        group="training",
    )
    jitters: int = option(
        None,
        "views or crops of an image in a step, new ones in each; by default 2, with the preset paper 5",
        group="training",
        at_least=1,
    )
    projections: int | None = option(
        30, "random channels that are compared in a step; null for all channels", group="training", at_least=1
    )
    downsampler: Literal["attention", "blur"] = option(
        "attention",
        "views: model of the backbone's patch that is trained with the upsampler: attention or blur",
        group="training",
    )
    uncertainty: bool = option(
        True, "views: predict the log sigma of each cell of a view, and weight its error by it", group="training"
    )
    max_pad: int = option(
        20, "views: pixels of reflected border, the largest shift", group="training", at_least=0, at_most=16384
    )
    max_zoom: float = option(2.0, "views: the largest zoom, 1 for none", group="training", at_least=1)
    crf: float = option(0.001, "views: weight of the sampled CRF, 0 for none", group="training", at_least=0)
    crf_positions: int = option(
        1000, "views: positions that the CRF compares, each with each", group="training", at_least=1, at_most=10000
    )
    total_variation: float = option(
        0.0, "views: weight of the total variation, 0 for none", group="training", at_least=0
    )
    magnitude: float = option(0.0, "views: weight of the features' norms, 0 for none", group="training", at_least=0)
    least_crop: float = option(
        0.5,
        "crops: the smallest side of a crop, as a share of the image's",
        group="training",
        at_least=0.05,
        at_most=0.95,
    )
    crop_detail: int = option(
        2,
        "crops: images are decoded at so many times the size, and crops are cut from that",
        group="training",
        at_least=1,
        at_most=8,
    )

    steps: int = option(
        None, "updates of the weights; by default 400, with the preset paper 2000", group="training", at_least=1
    )
    batch_size: int = option(
        None,
        "images in one step, over all workers; by default 2, with the preset paper 4",
        group="training",
        at_least=1,
    )
    optimiser: Literal["nadam", "adamw"] = option("nadam", "nadam or adamw", group="training")
    lr: float = option(1e-3, "learning rate", group="training", above=0)
    schedule: Literal["constant", "cosine"] = option(
        "constant", "of the learning rate: constant, or cosine down to 0", group="training"
    )
    clip_steps: int = option(
        10, "the first steps, whose gradients are clipped; 0 for none", group="training", at_least=0
    )
    clip_norm: float = option(1e-4, "the norm of all gradients of such a step, at most", group="training", above=0)
    seed: int = option(
        0,
        "of initial weights, the order of the samples, views, crops, projections and dropout",
        group="training",
        at_least=0,
        at_most=LARGEST_SEED,
    )
    holdout: float = option(
        0.1,
        "samples, spread over the data set, for evaluation only: below 1 a share of them (16 to 128 samples, at most a "
        "quarter), else so many",
        group="training",
        above=0,
    )
    evaluate_every: int = option(
        100,
        "steps from one evaluation to the next; the weights of least held-out loss are kept",
        group="training",
        at_least=1,
    )

    workers: int = option(
        1, "processes that train, each with its share of the batch", group="run", run=True, at_least=1
    )
    gpus_per_worker: float | None = option(
        None,
        "GPUs of each worker: a fraction or a whole number; by default 1 where the cluster has GPUs, else 0",
        group="run",
        run=True,
        at_least=0,
    )
    cpus_per_worker: float = option(1.0, "CPU cores Ray reserves for each worker", group="run", run=True, at_least=0.01)
    worker_attempts: int = option(
        3, "how often the workers are started before the job fails", group="run", run=True, at_least=1
    )
    checkpoint_every: int = option(
        100,
        "steps from one checkpoint to the next; a stopped run resumes from the last",
        group="run",
        run=True,
        at_least=1,
    )
    tensorboard: bool = option(False, "also write TensorBoard event files, into OUT/tensorboard", group="run", run=True)

    def __post_init__(self) -> None:
        # Before anything is compared or recorded: a record holds the numbers themselves.
        for name, value in _PRESETS.get(self.preset, _PRESETS["fast"]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        # Workers may have another working folder.
        others = [text.partition("=") for text in self.also_backbones]
        object.__setattr__(
            self, "also_backbones", tuple(name + equals + _absolute(file) for name, equals, file in others)
        )
        super().__post_init__()

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
            (
                self.batch_size % self.workers != 0,
                f"batch_size={self.batch_size} is that of all {self.workers} workers and must divide among them, or "
                "some images would count for more than others",
            ),
            (
                self.holdout > 1 and self.holdout != int(self.holdout),
                f"holdout={self.holdout} must be a share below 1, or a whole number of samples",
            ),
            (
                bool(self.also_backbones) and (self.upsampler, self.objective) != ("anyup", "crops"),
                f"also_backbones={self.also_backbones} with upsampler={self.upsampler} and objective={self.objective}: "
                "only anyup takes features of several backbones, and only crops need no downsampler of each",
            ),
            whole_gpus("gpus_per_worker", self.gpus_per_worker),
            (
                self.tensorboard and not storage.is_local(self.out),
                f"tensorboard with out={self.out!r}: event files are written to local folders only; leave it away, "
                "log.jsonl holds the same numbers",
            ),
        ]


def _absolute(file: str) -> str:
    """A local path made absolute; URLs and no file stay as they are."""
    return os.path.abspath(os.path.expanduser(storage.local_path(file))) if file and storage.is_local(file) else file

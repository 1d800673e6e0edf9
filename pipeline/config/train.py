"""Options of ``jobs.train_jbu``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from featup.upsamplers import RangeKernel, TrainableName
from pipeline.config.base import InputConfig, option
from pipeline.inputs import storage

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(InputConfig):
    """Options of ``jobs.train_jbu``: shards of images in, a trained upsampler out."""

    upsampler: TrainableName = option("jbu", "what is trained: jbu, resize_conv, carafe, sapa or ifa")
    kernel: RangeKernel = option(
        "distance", "jbu: the range kernel, distance (starts as a bilateral filter) or projection (the paper's)"
    )
    start_space: float = option(3.0, "distance kernel: sigma it starts with, in pixels of a stage; 1 for small things")
    start_colour: float = option(0.1, "distance kernel: sigma it starts with, on RGB in [-1, 1]")
    feature_keys: int = option(
        8, "distance kernel: directions of the coarse features that it compares beside colours, 0 for colours alone"
    )
    coarse_stages: int = option(
        2, "distance kernel: stages at the features' own size before the doublings; 0 for small things"
    )
    bicubic_a: float = option(
        -2.0, "distance kernel: of the bicubic interpolation in a stage; -0.75 is the usual one, less sharpens more"
    )
    downsampler: Literal["attention", "blur"] = option(
        "attention", "the model of the backbone's patch that is trained with it: attention or blur"
    )
    jitters: int = option(2, "jittered views of an image that its features must explain, new ones in every step")
    max_pad: int = option(20, "jitter: pixels of reflected border, and so the largest shift")
    max_zoom: float = option(1.0, "jitter: the largest zoom, 1 for none")
    projections: int | None = option(30, "random channels that are compared in a step; null for all channels")
    crf: float = option(0.001, "weight of the sampled CRF, 0 for none")
    total_variation: float = option(0.0, "weight of the total variation, 0 for none")
    magnitude: float = option(0.0, "weight of the vectors' lengths, 0 for none")

    steps: int = option(
        200, "updates of the weights; ten times as many for what starts from random ones: all but the distance kernel"
    )
    batch_size: int = option(2, "images in one step, over all workers")
    optimiser: Literal["nadam", "adamw"] = option("nadam", "nadam or adamw")
    lr: float = option(3e-5, "learning rate; thirty times as much for what starts from random weights")
    schedule: Literal["constant", "cosine"] = option("constant", "of the learning rate: constant, or cosine down to 0")
    seed: int = option(0, "of the first weights, the order of the samples, views, projections and dropout")
    holdout: int = option(32, "samples, spread over the data set, that are evaluated on and never trained on")
    evaluate_every: int = option(200, "steps from one evaluation to the next; the best one is kept")

    workers: int = option(1, "processes that train, each with its share of the batch", run=True)
    gpus_per_worker: float | None = option(None, "by default 1 where the cluster has GPUs, else 0", run=True)
    cpus_per_worker: float = option(1.0, "CPU cores Ray sets aside for each of them", run=True)
    worker_attempts: int = option(3, "how often the workers are started before the job fails", run=True)
    checkpoint_every: int = option(100, "steps from one checkpoint to the next; a run goes on from the last", run=True)
    tensorboard: bool = option(False, "also write TensorBoard event files, into OUT/tensorboard", run=True)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        counts = ["steps", "jitters", "batch_size", "holdout", "evaluate_every"]
        counts += ["workers", "worker_attempts", "checkpoint_every"]
        return [
            *super()._checks(),
            (min(self.size) < 1, f"size={self.size}: both sides must be at least 1"),
            *((getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 1") for name in counts),
            (
                self.projections is not None and self.projections < 1,
                f"projections={self.projections} must be at least 1, or null for all channels",
            ),
            (self.max_pad < 0, f"max_pad={self.max_pad} must be 0 pixels or more"),
            (not self.max_zoom >= 1, f"max_zoom={self.max_zoom} must be at least 1"),
            (not self.lr > 0, f"lr={self.lr} must be positive"),
            (
                not min(self.start_space, self.start_colour) > 0,
                f"start_space={self.start_space} and start_colour={self.start_colour} must be positive",
            ),
            (
                min(self.feature_keys, self.coarse_stages) < 0,
                f"feature_keys={self.feature_keys} and coarse_stages={self.coarse_stages} must be 0 or more",
            ),
            (self.seed < 0, f"seed={self.seed} must be 0 or more"),
            (
                not min(self.crf, self.total_variation, self.magnitude) >= 0,
                f"crf={self.crf}, total_variation={self.total_variation}, magnitude={self.magnitude}: weights cannot "
                "be negative",
            ),
            (
                self.batch_size % max(1, self.workers) != 0,
                f"batch_size={self.batch_size} is that of all {self.workers} workers and must divide among them, or "
                "some images would count for more than others",
            ),
            (
                self.tensorboard and not storage.is_local(self.out),
                f"tensorboard with out={self.out!r}: event files are written to local folders only; leave it away, "
                "log.jsonl holds the same numbers",
            ),
        ]

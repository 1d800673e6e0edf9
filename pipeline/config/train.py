"""Options of ``featup train_jbu``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from featup.names import RangeKernel, TrainableName
from pipeline.config.base import LARGEST_SEED, InputConfig, whole_gpus
from pipeline.inputs import storage
from pipeline.options import option

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(InputConfig):
    """Options of ``featup train_jbu``: shards of images in, a trained upsampler out."""

    upsampler: TrainableName = option(
        "jbu", "the upsampler to train: jbu, resize_conv, carafe, sapa or ifa", group="upsampler"
    )
    kernel: RangeKernel = option(
        "distance",
        "jbu: the range kernel, distance (starts as a bilateral filter) or projection (the paper's)",
        group="upsampler",
    )
    start_space: float = option(
        3.0,
        "distance kernel: initial spatial sigma, in pixels of a stage; 1 for small objects",
        group="upsampler",
        above=0,
    )
    start_colour: float = option(
        0.1, "distance kernel: initial colour sigma, on RGB in [-1, 1]", group="upsampler", above=0
    )
    feature_keys: int = option(
        8,
        "distance kernel: feature affinity, directions of the coarse features that are compared beside colours; 0 for "
        "none",
        group="upsampler",
        at_least=0,
        at_most=29,
    )
    coarse_stages: int = option(
        2,
        "distance kernel: stages of same-resolution filtering before the 2x stages; 0 for small objects",
        group="upsampler",
        at_least=0,
        at_most=16,
    )
    bicubic_a: float = option(
        -2.0,
        "distance kernel: Keys' a of the bicubic interpolation in a stage; -0.75 is the usual value, lower is sharper",
        group="upsampler",
        at_least=-8,
        at_most=0,
    )

    downsampler: Literal["attention", "blur"] = option(
        "attention",
        "model of the backbone's patch that is trained with the upsampler: attention or blur",
        group="training",
    )
    jitters: int = option(
        2, "jittered views of an image that its features must explain, new ones each step", group="training", at_least=1
    )
    max_pad: int = option(
        20, "jitter: pixels of reflected border, the largest shift", group="training", at_least=0, at_most=16384
    )
    max_zoom: float = option(1.0, "jitter: the largest zoom, 1 for none", group="training", at_least=1)
    projections: int | None = option(
        30, "random channels that are compared in a step; null for all channels", group="training", at_least=1
    )
    crf: float = option(0.001, "weight of the sampled CRF, 0 for none", group="training", at_least=0)
    total_variation: float = option(0.0, "weight of the total variation, 0 for none", group="training", at_least=0)
    magnitude: float = option(0.0, "weight of the features' norms, 0 for none", group="training", at_least=0)

    steps: int = option(
        200,
        "updates of the weights; ten times as many for upsamplers with random initial weights: all but the distance "
        "kernel",
        group="training",
        at_least=1,
    )
    batch_size: int = option(2, "images in one step, over all workers", group="training", at_least=1)
    optimiser: Literal["nadam", "adamw"] = option("nadam", "nadam or adamw", group="training")
    lr: float = option(
        3e-5, "learning rate; thirty times as much for random initial weights", group="training", above=0
    )
    schedule: Literal["constant", "cosine"] = option(
        "constant", "of the learning rate: constant, or cosine down to 0", group="training"
    )
    seed: int = option(
        0,
        "of initial weights, the order of the samples, views, projections and dropout",
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
        200, "steps from one evaluation to the next; the best weights are kept", group="training", at_least=1
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
            whole_gpus("gpus_per_worker", self.gpus_per_worker),
            (
                self.tensorboard and not storage.is_local(self.out),
                f"tensorboard with out={self.out!r}: event files are written to local folders only; leave it away, "
                "log.jsonl holds the same numbers",
            ),
        ]

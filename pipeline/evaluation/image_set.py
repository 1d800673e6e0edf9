"""A labelled set of images with their coarse features, in memory."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.upsamplers import ChannelMap
from pipeline.compute.device import choose_device, device_of
from pipeline.compute.load import image_options, load_sample
from pipeline.config.evaluate import EvaluateConfig
from pipeline.decode.sample import PreparedSample
from pipeline.errors import InputError, JobFailedError, SampleError
from pipeline.evaluation.methods import FeedForwardMethod, Method
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, make_plan
from pipeline.progress import CountProgress
from pipeline.redaction import redact
from pipeline.training.tasks import Task

__all__ = ["ImageSet", "evenly_spaced", "flip_set", "load_set", "picture_name", "seg_dtype"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images in memory.

    ``images`` uint8 ``[N, H, W, 3]``; ``features`` of the backbone, float32 ``[N, h, w, C]``; ``labels`` as the task
    prepares them, ``[N, H, W]``, empty without a task; ``keys`` ``[N]``; ``facts`` of where they come from.
    """

    images: Tensor
    features: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images and their labels."""
        return self.images.shape[1], self.images.shape[2]

    def batches(self, size: int) -> Iterator[slice]:
        """Consecutive images, so many at a time."""
        yield from (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def upsample(self, method: Method, batch: slice | Tensor, projection: ChannelMap | None) -> Tensor:
        """A method's result for some of the images, at their own size, on the device of the computation.

        Args:
            method: Of upsampling.
            batch: Which images, as a slice or as numbers.
            projection: See :meth:`Method.predict`.
        """
        return method.predict(*self._inputs(batch), projection, self.size)

    def filter_scores(self, method: FeedForwardMethod, batch: slice, probe: ChannelMap) -> Tensor:
        """Upsampled class probabilities of some of the images; see :meth:`FeedForwardMethod.filter_scores`."""
        return method.filter_scores(*self._inputs(batch), probe, self.size)

    def _inputs(self, batch: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Images and features on the device of the computation."""
        device = choose_device(None)
        return self.images[batch].to(device), self.features[batch].to(device)


def load_set(
    config: EvaluateConfig, backbone: Backbone, shards: Sequence[str], task: Task | None, limit: int | None
) -> ImageSet:
    """Decode images and labels with all cores, and compute their coarse features.

    Raises:
        InputError: shards that cannot be found, or hold no sample that can be used.
        JobFailedError: more samples than allowed cannot be decoded.
        ConfigError: labels that are not of the task's classes.
    """
    index_dir = storage.join(config.out, "plan", "index")
    storage.make_dirs(index_dir)
    plan = Plan(make_plan(shards, index_dir, limit), 1, index_dir)
    options = replace(
        image_options(config, backbone.mean),
        labels=() if task is None else (task.kind,),
        seg_dtype=seg_dtype(config),
    )

    def load(number: int) -> tuple[str, PreparedSample | SampleError]:
        shard, position = plan.sample(number)
        index = plan.index(shard)
        try:
            return index.samples[position].key, load_sample(index, position, options)
        except SampleError as error:
            return index.samples[position].key, error

    keys, images, labels, failures = [], [], [], []
    with (
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
        CountProgress(plan.samples, "images") as progress,
    ):
        for number, (key, sample) in enumerate(pool.map(load, range(plan.samples)), 1):
            progress.reach(number, "decoded")
            if isinstance(sample, SampleError):
                failures.append(f"{key}: {sample}")
                continue
            keys.append(key)
            images.append(torch.from_numpy(sample.image))
            if task is not None:
                # PyTorch has no uint16 to compute with.
                dtype = np.int32 if task.kind == "seg" else np.float32
                labels.append(task.prepare(torch.from_numpy(sample.labels[task.kind].astype(dtype))))
    if len(failures) > config.max_failed_fraction * plan.samples or not images:
        error = JobFailedError if images else InputError
        raise error(
            f"{len(failures)} of {plan.samples} samples of {list(shards)} cannot be used: {'; '.join(failures[:5])}; "
            "mend the shards, or raise max_failed_fraction"
        )
    pixels = torch.stack(images)
    facts = {
        "images": len(keys),
        "failed": failures,
        "faults": plan.faults,
        "digest": plan.digest,
        "shards": [redact(shard.url) for shard in plan.shards],
    }
    features = _coarse_features(backbone, pixels, config.batch_size)
    return ImageSet(pixels, features, torch.stack(labels) if labels else torch.empty(0), tuple(keys), facts)


def flip_set(config: EvaluateConfig, backbone: Backbone, images: ImageSet) -> ImageSet:
    """The images and labels mirrored left to right, with the coarse features of the mirrored images."""
    pixels = images.images.flip(2)
    return replace(
        images,
        images=pixels,
        labels=images.labels.flip(2),
        features=_coarse_features(backbone, pixels, config.batch_size),
    )


def _coarse_features(backbone: Backbone, images: Tensor, batch_size: int) -> Tensor:
    maps = []
    with torch.inference_mode(), CountProgress(len(images), "images") as progress:
        for batch in torch.split(images, batch_size):
            maps.append(backbone(batch.to(device_of(backbone))).cpu())
            progress.reach(progress.done + len(batch), "through the backbone")
    # Outside of inference mode, because training cannot use tensors that were made in it.
    return torch.cat(maps)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Numbers of at most ``most`` of ``count`` images, spread over the set."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def picture_name(kind: str, images: ImageSet, number: int) -> str:
    """Of the picture of an image, without its suffix: ``KIND_NUMBER_KEY``."""
    return f"{kind}_{number:05d}_{images.keys[number].replace('/', '_')}"


def seg_dtype(config: EvaluateConfig) -> Literal["uint8", "uint16"]:
    """The type that holds all class ids."""
    return "uint16" if max(config.classes or 0, config.ignore_index) > 255 else "uint8"

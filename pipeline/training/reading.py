"""Items of a store read by processes of their own, which import as little as they need."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from featup.upsamplers.base import ChannelMap
from pipeline.errors import EnvironmentFault, PipelineError
from pipeline.loader import FeatureDataset
from pipeline.training.pixels import PixelDataset
from pipeline.training.tasks import Task

__all__ = ["ProbeStatistics", "read_batches"]


@dataclass(frozen=True, eq=False)
class ProbeStatistics:
    """A transform of :class:`FeatureDataset`: a probe's statistics of an image, ``[1, ...]``.

    They are computed in the process that reads, so that no image's features travel from there.
    """

    task: Task
    channel_map: ChannelMap

    @torch.inference_mode()
    def __call__(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """One sample of the dataset."""
        output = functional.linear(sample["features"], self.channel_map.weight, self.channel_map.bias)
        labels = self.task.prepare(sample[self.task.kind])
        return {"statistics": self.task.statistics(self.task.decide(output[None]), labels[None])}


class _ErrorsAsItems(Dataset[dict[str, Tensor] | PipelineError]):
    """A data set that returns the project's own errors: PyTorch would wrap them into the traceback of a process."""

    def __init__(self, dataset: Dataset[dict[str, Tensor]], count: int) -> None:
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor] | PipelineError:
        try:
            return self.dataset[index]
        except PipelineError as error:
            return error


def _join(items: list[dict[str, Tensor] | PipelineError]) -> dict[str, Tensor] | PipelineError:
    samples = []
    for item in items:
        if isinstance(item, PipelineError):
            return item
        samples.append(item)
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def read_batches(dataset: PixelDataset | FeatureDataset, workers: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The items of a data set in their order, so many of them joined along their first dimension.

    Args:
        dataset: The items, dictionaries of tensors.
        workers: Processes that read; 0 reads in this one.
        batch_size: Items that are joined.

    Raises:
        PipelineError: an item's own error.
        EnvironmentFault: a process ended at once, as it does where the memory it shares is full.
    """
    loader = DataLoader(
        _ErrorsAsItems(dataset, len(dataset)),
        batch_size=batch_size,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        collate_fn=_join,
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            # PyTorch has no class of its own for the end of a reading process, nor for shared memory that is full.
            text = str(error).splitlines()[0]
            if not re.search(r"^DataLoader worker .*(killed|exited)|shared memory|/dev/shm|/torch_", text):
                raise
            raise EnvironmentFault(
                f"a process that reads the store ended ({text}). Likely cause: too little memory, or too little shared "
                f"memory (/dev/shm, 64 MB in a container by default); give --workers 0 in place of {workers}, "
                "or the container a larger --shm-size"
            ) from error
        if batch is None:
            return
        if isinstance(batch, PipelineError):
            raise batch
        yield batch

"""Items of a store read by processes of their own, and what becomes of their errors."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from pipeline.errors import EnvironmentFault
from pipeline.loader import FeatureDataset
from pipeline.training.pixels import PixelDataset
from pipeline.training.reading import read_batches
from pipeline.training.tasks import DepthTask
from tests.pipeline.training.support import linear_store


@dataclass(frozen=True)
class BusError:
    """A transform that ends a reading process as full shared memory does."""

    def __call__(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGBUS)
        return sample


def test_batches_are_the_items_in_order(tmp_path: Path) -> None:
    dataset = PixelDataset(linear_store(str(tmp_path), 5, 1), DepthTask(), 4, 1000, seed=0)
    batches = list(read_batches(dataset, workers=0, batch_size=2))
    assert [batch["image"].tolist() for batch in batches] == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4, [4] * 4]
    features = torch.cat([dataset[image]["features"] for image in range(5)])
    assert torch.equal(torch.cat([batch["features"] for batch in batches]), features)


def test_the_end_of_a_reading_process_names_the_cure(tmp_path: Path) -> None:
    dataset = FeatureDataset(linear_store(str(tmp_path), 2, 1), ["seg"], transform=BusError())
    with pytest.raises(EnvironmentFault, match=r"shared memory .*; give --workers 0 in place of 1, or the container"):
        list(read_batches(dataset, workers=1, batch_size=1))

"""Why a training run ended, in one line."""

import pytest
import ray.train
import torch

from pipeline.cluster.train import failure_of
from pipeline.config.train import TrainConfig
from pipeline.errors import JobFailedError, StoreError

CONFIG = TrainConfig(shards=("a.tar",), out="out", workers=2, batch_size=4)


def test_an_error_of_the_projects_own_is_raised_as_it_is() -> None:
    cause = StoreError("worker 1 has other weights")
    error = ray.train.WorkerGroupError("long text\nof a traceback", {0: RuntimeError("peer gone"), 1: cause})
    assert failure_of(error, CONFIG) is cause


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ray.train.WorkerGroupError("text\nTraceback", {0: OSError(28, "No space left on device")}),
            "the workers failed 3 times, last by OSError: [Errno 28] No space left on device; run the same command "
            "again to go on from the last checkpoint",
        ),
        (
            ray.train.ControllerError(ValueError("\nno placement group\nTraceback ...")),
            "the workers failed 3 times, last by ValueError: no placement group; run the same command again to go on "
            "from the last checkpoint",
        ),
        (
            ray.train.WorkerGroupError("text", {1: torch.OutOfMemoryError("CUDA out of memory.\nTried to ...")}),
            "the workers failed 3 times, last by OutOfMemoryError: CUDA out of memory.; run the same command again to "
            "go on from the last checkpoint, with more than 2 workers to share batch_size=4, or start anew in another "
            "--out with a smaller one",
        ),
    ],
    ids=["disk", "controller", "memory"],
)
def test_other_errors_are_one_line_with_the_cure(error: ray.train.TrainingFailedError, text: str) -> None:
    failure = failure_of(error, CONFIG)
    assert isinstance(failure, JobFailedError)
    assert str(failure) == text

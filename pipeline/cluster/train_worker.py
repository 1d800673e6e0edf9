"""A training worker under Ray Train: its session, and the list of checkpoints that a crash may not break."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray.train
import ray.train.torch
import torch

from pipeline.config.train import TrainConfig
from pipeline.inputs import storage
from pipeline.training.loop import Session, TrainingWorker
from pipeline.training.progress import StepProgress

__all__ = ["CHECKPOINTS", "StepBoard", "mend_snapshot", "train_worker"]


# Ray Train's folder in OUT.
CHECKPOINTS = "checkpoints"


def _snapshot_places(config: TrainConfig) -> tuple[str, str]:
    """Ray Train's list of its checkpoints, and our copy of it."""
    folder = storage.join(config.out, CHECKPOINTS)
    return storage.join(folder, "checkpoint_manager_snapshot.json"), storage.join(config.out, "plan", "snapshot.json")


def mend_snapshot(config: TrainConfig) -> None:
    """Restore Ray Train's list of its checkpoints, where a crash left half of it.

    Ray Train writes the list in place, and cannot go on from half of it.
    """
    place, copy = _snapshot_places(config)
    if storage.exists(place) and _whole_json(place) is None:
        data = _whole_json(copy) if storage.exists(copy) else None
        if data is None:
            storage.remove(place)
        else:
            storage.write_atomic(place, data)


def _copy_snapshot(config: TrainConfig) -> None:
    place, copy = _snapshot_places(config)
    if storage.exists(place) and (data := _whole_json(place)) is not None:
        storage.write_atomic(copy, data)


def _whole_json(place: str) -> bytes | None:
    data = storage.read_bytes(place)
    try:
        json.loads(data)
    except ValueError:
        return None
    return data


def train_worker(arguments: Mapping[str, Any]) -> None:
    """The function that Ray Train runs in each worker."""
    config = arguments["config"]
    session = _RaySession(config, arguments["board"])
    TrainingWorker(config, arguments["plan"], arguments["provenance"], session).run()


class StepBoard:
    """The actor where the first worker writes how far it is, for the driver to show on its terminal."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def write(self, step: int, loss: float) -> None:
        """A step, and its loss."""
        self._last = step, loss

    def read(self) -> tuple[int, float] | None:
        """The last step and its loss; ``None`` before the first."""
        return self._last


class _RaySession(Session):
    """A worker's connection to the others, by Ray Train."""

    def __init__(self, config: TrainConfig, board: Any) -> None:
        """
        Args:
            config: of the run.
            board: the driver's :class:`StepBoard`; ``None`` where the steps are printed as lines.
        """
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.workers: int = context.get_world_size()
        self.workers_here: int = context.get_local_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._config = config
        self._board = board
        self._lines: StepProgress | None = None

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        prepared: torch.nn.Module = ray.train.torch.prepare_model(
            model,
            # A nearer size runs fewer stages than the stack has: the others get no gradient.
            parallel_strategy_kwargs={"find_unused_parameters": True},
        )
        return prepared

    @contextmanager
    def last_checkpoint(self) -> Iterator[str | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield folder

    def before_checkpoint(self) -> None:
        _copy_snapshot(self._config)

    def show_step(self, step: int, loss: float) -> None:
        if self._board is not None:
            self._board.write.remote(step, loss)
            return
        self._lines = self._lines or StepProgress(step - 1, self._config.steps)
        self._lines.add(step, loss)

    def report(self, metrics: dict[str, Any], checkpoint: str | None = None) -> None:
        ray.train.report(metrics, checkpoint=checkpoint and ray.train.Checkpoint.from_directory(checkpoint))

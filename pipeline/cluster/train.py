"""Trains a learned upsampler on the images of shards; the one place that knows Ray Train.

Every worker has its share of every step's batch, decoded ahead of time, and gradients are averaged over the workers.
What a step sees follows from the seed and its number alone, so a run that was interrupted goes on from its last
checkpoint as if it had not been, with as many workers as there are now.

What a run leaves in ``OUT``::

    OUT/last.safetensors  OUT/best.safetensors    the upsampler after the last step, and where it was best
    OUT/log.jsonl  OUT/loss.png                   a line per step, and the picture of it
    OUT/config.yaml                               all options
    OUT/plan/  OUT/checkpoints/                   tar indices and what the run is; Ray Train's checkpoints
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import yaml

from featup.checkpoints import CHECKPOINT_FORMAT
from featup.errors import FeatupError
from pipeline.cluster.connect import connect
from pipeline.cluster.planning import index_on_ray
from pipeline.cluster.resources import default_gpus
from pipeline.compute.models import make_backbone
from pipeline.compute.prepare import plan_input, versions
from pipeline.config.base import describe
from pipeline.config.train import TrainConfig
from pipeline.errors import JobFailedError, PipelineError, StoreMismatchError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.store.layout import list_differences
from pipeline.training.log import plot_log, read_log
from pipeline.training.loop import (
    TrainingWorker,
    describe_backbone,
)
from pipeline.training.order import SampleOrder

__all__ = ["train"]


_CHECKPOINTS = "checkpoints"


def train(config: TrainConfig) -> None:
    """Train to the last step, from the last checkpoint where there is one. Running it again when done changes nothing.

    Raises:
        JobFailedError: the workers failed for good, or too many samples could not be decoded.
        StoreMismatchError: ``out`` holds a run with other options, input or weights.
    """
    config = config.absolute(on_cluster=bool(os.environ.get("RAY_ADDRESS")))
    _check_run(config, config.identity())
    # Ray Train has a helper that warns every second where there is no dashboard to ask.
    connect(config.object_store_mb, ray.LoggingConfig(log_level="ERROR"))
    shards = plan_input(config, index_all=index_on_ray)
    plan = Plan(shards, 1, storage.join(config.out, "plan", "index"))
    order = SampleOrder(plan.samples, config.holdout, config.seed)
    gpus = default_gpus(config.gpus_per_worker)
    # Also tells of options that do not fit, before any worker starts.
    backbone = describe_backbone(config, make_backbone(config))
    identity = config.identity() | {"backbone digest": backbone["digest"]}
    identity |= {"input shards": len(shards), "input samples": plan.samples, "input digest": plan.digest}
    _check_run(config, identity)
    provenance = {"identity": identity, "config": describe(config), "backbone": backbone, "versions": versions()}
    storage.write_atomic(_run_place(config), json.dumps({"format": CHECKPOINT_FORMAT, **provenance}).encode())
    storage.write_atomic(
        storage.join(config.out, "config.yaml"), yaml.safe_dump(describe(config), sort_keys=False).encode()
    )
    for fault in plan.faults:
        print(f"input fault: {fault}", flush=True)
    print(
        f"{config.out}: {len(order)} samples to train on and {config.holdout} held out; {config.upsampler} for "
        f"{config.backbone}, {backbone['grid'][0]}x{backbone['grid'][1]} to {config.size}, {backbone['channels']} "
        f"channels; {config.steps} steps of {config.batch_size} images, workers: {config.workers}",
        flush=True,
    )
    _mend_snapshot(config)
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={"config": config, "plan": plan, "provenance": provenance},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=_CHECKPOINTS,
            storage_path=config.out,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=config.worker_attempts - 1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, (PipelineError, FeatupError)):
                raise cause from None
        raise JobFailedError(
            f"the workers failed {config.worker_attempts} times, last by: {error}. Run the same command again to go "
            "on from the last checkpoint"
        ) from error
    lines = read_log(config.out, config.steps)
    storage.write_atomic(storage.join(config.out, "loss.png"), plot_log(lines))
    _conclude(config, order, result.metrics, lines)


def _conclude(
    config: TrainConfig, order: SampleOrder, metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> None:
    """The account, and whether the job failed by it."""
    draws = config.steps * config.batch_size
    failed = metrics["failed_draws"]
    print(
        f"input {order.samples} = train {len(order)} + held out {order.holdout}; "
        f"drawn {draws} = used {draws - failed} + failed {failed}, the next in order standing in for these; "
        f"{metrics['failed_samples']} samples cannot be decoded"
    )
    for text in metrics["failures"]:
        print(f"  {text}")
    scores = {line["step"]: line["explained_variance"] for line in lines if "explained_variance" in line}
    print(
        f"explained variance on images held out: {metrics['best']:.4f} at step {metrics['best_step']}, "
        f"{scores[config.steps]:.4f} at the end, {lines[0]['bilinear']:.4f} by bilinear; "
        f"{storage.join(config.out, 'best.safetensors')}",
        flush=True,
    )
    if failed > config.max_failed_fraction * draws:
        raise JobFailedError(
            f"{failed} of {draws} draws failed ({failed / draws:.2%}), more than "
            f"max_failed_fraction={config.max_failed_fraction:.2%}; what was trained is there. Look at the reasons, "
            "mend the shards and train again, or raise the limit"
        )


def _run_place(config: TrainConfig) -> str:
    return storage.join(config.out, "plan", "run.json")


def _check_run(config: TrainConfig, wanted: Mapping[str, Any]) -> None:
    """Refuse another run's folder before anything in it is touched."""
    place = _run_place(config)
    if not storage.exists(place):
        return
    found = json.loads(storage.read_bytes(place))["identity"]
    differences = list_differences({name: found.get(name) for name in wanted}, wanted)
    if differences:
        raise StoreMismatchError(
            f"{config.out} was begun with other options, input or weights:\n  " + "\n  ".join(differences) + "\n"
            "Finish it with those it was begun with, or give another --out."
        )


def _snapshot_places(config: TrainConfig) -> tuple[str, str]:
    """Ray Train's list of its checkpoints, and our copy of it."""
    folder = storage.join(config.out, _CHECKPOINTS)
    return storage.join(folder, "checkpoint_manager_snapshot.json"), storage.join(config.out, "plan", "snapshot.json")


def _mend_snapshot(config: TrainConfig) -> None:
    # Ray Train writes its list of checkpoints in place: a crash right then leaves half of it, and no way to go on.
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


def _train_worker(arguments: Mapping[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    config = arguments["config"]
    TrainingWorker(config, arguments["plan"], arguments["provenance"], _RaySession(config)).run()


class _RaySession:
    """A worker's connection to the others, by Ray Train."""

    def __init__(self, config: TrainConfig) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.workers: int = context.get_world_size()
        self.workers_here: int = context.get_local_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._config = config

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

    def report(self, metrics: dict[str, Any], checkpoint: str | None = None) -> None:
        ray.train.report(metrics, checkpoint=checkpoint and ray.train.Checkpoint.from_directory(checkpoint))

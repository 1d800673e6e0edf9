"""Training of a learned upsampler on the images of shards, by Ray Train.

Every worker has its share of every step's batch, decoded ahead of time, and gradients are averaged over the workers.
A step's images follow from the seed and the step's number alone, so that an interrupted run goes on from its last
checkpoint to the same result, with as many workers as there are now.

A run leaves in ``OUT``::

    OUT/last.safetensors  OUT/best.safetensors    the upsampler after the last step, and of least held-out loss
    OUT/log.jsonl  OUT/loss.png                   a line per step, and the picture of it
    OUT/config.yaml                               all options
    OUT/plan/  OUT/checkpoints/                   tar indices and the record of the run; Ray Train's checkpoints
"""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import yaml

from featup.errors import FeatupError
from pipeline.cluster.connect import connect
from pipeline.cluster.planning import index_on_ray
from pipeline.cluster.resources import await_resources, cluster_resources, default_gpus
from pipeline.cluster.train_worker import CHECKPOINTS, StepBoard, mend_snapshot, train_worker
from pipeline.compute.allotment import this_machine
from pipeline.compute.prepare import plan_input, versions
from pipeline.config.base import describe
from pipeline.config.train import TrainConfig
from pipeline.errors import JobFailedError, PipelineError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.progress import CountProgress, is_live
from pipeline.store.lease import Lease
from pipeline.training.create import describe_backbones, make_backbones
from pipeline.training.log import plot_log, read_log, recorded_steps, warn_of_bilinear
from pipeline.training.order import SampleOrder, count_held_out
from pipeline.training.run import check_run, record_run

__all__ = ["failure_of", "train"]


def train(config: TrainConfig) -> None:
    """Train to the last step, from the last checkpoint where there is one. Running it again when done changes nothing.

    Raises:
        ConfigError: the workers ask for what this machine does not have, or the cluster did not get in time.
        JobFailedError: the workers failed for good, or too many samples could not be decoded.
        LeaseError: another driver is at work on ``out``.
        StoreMismatchError: ``out`` holds a run with other options, input or weights.
        SystemExit: with 130 or 143 after Ctrl-C or SIGTERM.
    """
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    config = config.absolute(on_cluster=on_cluster)
    check_run(config.out, config.identity())
    with Lease.acquire(config.out) as lease:
        try:
            if not on_cluster:
                needed = _missing(config, config.gpus_per_worker or 0.0, this_machine())
                await_resources(lambda: needed, seconds=0.0, report=print)
            # Options that do not fit the backbone are refused here, before Ray starts.
            backbones = describe_backbones(config, make_backbones(config))
            # Ray Train has a helper that warns every second where there is no dashboard to ask.
            connect(config.object_store_mb, ray.LoggingConfig(log_level="ERROR"))
            _run(config, lease, on_cluster, backbones)
        except (KeyboardInterrupt, SystemExit) as stop:
            # Ctrl-C or SIGTERM: the job's last line says how far it came.
            done = f"{recorded_steps(config.out)} of {config.steps} steps done, up to the last checkpoint"
            stop.add_note(f"{done}; the same command goes on")
            raise


def _run(config: TrainConfig, lease: Lease, on_cluster: bool, backbones: Sequence[dict[str, Any]]) -> None:
    """Record the run, let the workers train, and write the picture and the summary."""
    gpus = default_gpus(config.gpus_per_worker)
    await_resources(
        lambda: _missing(config, gpus, cluster_resources()),
        seconds=config.resource_timeout if on_cluster else 0.0,
        report=lambda text: print(text, flush=True),
    )
    shards = plan_input(config, index_all=index_on_ray)
    plan = Plan(shards, 1, storage.join(config.out, "plan", "index"))
    order = SampleOrder(plan.samples, count_held_out(config.holdout, plan.samples), config.seed)
    identity = config.identity() | {"backbone digests": [backbone["digest"] for backbone in backbones]}
    identity |= {"input shards": len(shards), "input samples": plan.samples, "input digest": plan.digest}
    if any(shard.spread for shard in shards):
        # The first samples were taken once: such a run is another one.
        identity["samples within the limit"] = "spread evenly over the input"
    check_run(config.out, identity)
    provenance = {"identity": identity, "config": describe(config), "backbones": backbones, "versions": versions()}
    record_run(config.out, provenance)
    storage.write_atomic(
        storage.join(config.out, "config.yaml"), yaml.safe_dump(describe(config), sort_keys=False).encode()
    )
    for fault in plan.faults:
        print(f"input fault: {fault}", flush=True)
    backbone = backbones[0]
    print(
        f"{config.out}: {len(order)} samples to train on and {order.holdout} held out; {config.upsampler} for "
        f"{', '.join([config.backbone, *config.also_backbones])}, {backbone['grid'][0]}x{backbone['grid'][1]} to "
        f"{config.size}, {backbone['channels']} channels; by {config.objective}, preset {config.preset}: "
        f"{config.steps} steps of {config.batch_size} images, workers: {config.workers}",
        flush=True,
    )
    mend_snapshot(config)
    board = ray.remote(num_cpus=0)(StepBoard).remote() if is_live(sys.stdout) else None
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "plan": plan, "provenance": provenance, "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=config.out,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=config.worker_attempts - 1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result = _fit(trainer, lease, config, board)
    except ray.train.TrainingFailedError as error:
        raise failure_of(error, config) from error
    lines = read_log(config.out, config.steps)
    storage.write_atomic(storage.join(config.out, "loss.png"), plot_log(lines))
    _conclude(config, order, result.metrics, lines)


def _missing(config: TrainConfig, gpus: float, has: Mapping[str, float]) -> str:
    """What a cluster with so much ``CPU`` and ``GPU`` lacks for the workers; empty where nothing is missing."""
    cpus, needed_cpus, needed_gpus = has.get("CPU", 0.0), config.workers * config.cpus_per_worker, config.workers * gpus
    if needed_cpus <= cpus + 1e-6 and needed_gpus <= has.get("GPU", 0.0) + 1e-6:
        return ""
    return (
        f"{config.workers} workers of {config.cpus_per_worker:g} CPUs and {gpus:g} GPUs need {needed_cpus:g} CPUs and "
        f"{needed_gpus:g} GPUs, there are {cpus:g} and {has.get('GPU', 0.0):g}; give fewer --workers, less "
        "--cpus-per-worker or --gpus-per-worker"
    )


def _fit(trainer: ray.train.torch.TorchTrainer, lease: Lease, config: TrainConfig, board: Any) -> ray.train.Result:
    """Train, in a thread of its own: on the main thread Ray Train answers Ctrl-C by exit status 0.

    The thread is a daemon, so that it keeps no process alive that is to stop. On a terminal the steps are shown as they
    are written on the ``board``.
    """
    future: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=fit, name="fit", daemon=True).start()
    with ExitStack() as shown:
        progress: CountProgress | None = None
        running = True
        while running:
            wait([future], timeout=1.0)
            lease.check()
            # Looked up before the board is, or the last steps would not be shown.
            running = not future.done()
            if board is not None and (state := _read(board)):
                progress = progress or shown.enter_context(CountProgress(config.steps, "steps", before=state[0]))
                progress.reach(state[0], f"loss {state[1]:.4g}")
    return future.result()


def _read(board: Any) -> tuple[int, float] | None:
    """The last step on the board, and its loss; ``None`` where it does not answer at once."""
    try:
        state: tuple[int, float] | None = ray.get(board.read.remote(), timeout=1.0)
    except ray.exceptions.RayError:
        return None
    return state


def failure_of(error: ray.train.TrainingFailedError, config: TrainConfig) -> Exception:
    """The reason that a run ended for, in one line; an error of this project's own as it was raised."""
    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    # Ray wraps what a worker raised, and then holds what was raised inside.
    causes = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    for cause in causes:
        if isinstance(cause, (PipelineError, FeatupError)):
            return cause
    text = next((line for line in str(causes[0]).splitlines() if line.strip()), "")
    cure = "run the same command again to go on from the last checkpoint"
    if isinstance(causes[0], torch.OutOfMemoryError):
        cure += f", with more than {config.workers} workers to share batch_size={config.batch_size}, or start anew in "
        cure += "another --out with a smaller one"
    return JobFailedError(
        f"the workers failed {config.worker_attempts} times, last by {type(causes[0]).__name__}: {text.strip()}; {cure}"
    )


def _conclude(
    config: TrainConfig, order: SampleOrder, metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> None:
    """Print the summary, and fail the job where too many samples had to be replaced."""
    sampled, replaced = config.steps * config.batch_size, metrics["replaced"]
    print(
        f"input {order.samples} = train {len(order)} + held out {order.holdout}; "
        f"sampled {sampled} = used {sampled - replaced} + replaced {replaced}, by the next samples in order; "
        f"{metrics['failed_samples']} samples cannot be decoded"
    )
    for text in metrics["failures"]:
        print(f"  {text}")
    print(
        f"held-out loss: {metrics['best']:.4f} at step {metrics['best_step']}, {lines[-1]['held_out_loss']:.4f} at the "
        f"end, {lines[0]['held_out_loss']:.4f} before training, {lines[0]['bilinear']['held_out_loss']:.4f} by "
        f"bilinear; {storage.join(config.out, 'best.safetensors')}",
        flush=True,
    )
    if warning := warn_of_bilinear(config, lines, metrics["best"]):
        print(warning, flush=True)
    if replaced > config.max_failed_fraction * sampled:
        raise JobFailedError(
            f"{replaced} of {sampled} sampled images could not be decoded ({replaced / sampled:.2%}), more than "
            f"max_failed_fraction={config.max_failed_fraction:.2%}; the trained upsampler is there. Look at the "
            "reasons, mend the shards and train again, or raise the limit"
        )

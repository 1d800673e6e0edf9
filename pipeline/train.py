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

import io
import json
import math
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from featup.backbones import Backbone
from featup.checkpoints import upsampler_bytes
from featup.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.errors import FeatupError
from featup.projection import PCAFit
from featup.training import MultiViewObjective, seeded
from featup.upsamplers import JBU, Interpolate, create_trainable
from featup.views import Jitter
from pipeline import storage
from pipeline.config import TrainConfig, describe
from pipeline.decode import DecodeOptions
from pipeline.errors import InputError, JobFailedError, PipelineError, SampleError, StoreError, StoreMismatchError
from pipeline.featurize import make_backbone, set_threads
from pipeline.load import image_options, load_sample
from pipeline.plan import Plan
from pipeline.progress import StepProgress
from pipeline.run import connect, default_gpus, index_on_ray, plan_input, versions
from pipeline.store import list_differences

__all__ = [
    "SampleOrder",
    "learning_rate",
    "load_draw",
    "make_objective",
    "plot_log",
    "read_log",
    "step_batches",
    "train",
]

_FORMAT = "featup-datasets/1"
_CHECKPOINTS = "checkpoints"
_STEPS_AHEAD = 4
_EVALUATION_BATCH = 4
_FAILURES_TOLD = 10
_KEY_IMAGES = 256
# What torch's own generator is seeded for; featup.training draws the rest, by smaller numbers.
_WEIGHTS, _DROPOUT = 100, 101


@dataclass(frozen=True)
class SampleOrder:
    """Which sample is drawn when: a permutation for each epoch of all samples that are not held out.

    ``samples`` in the plan, of which ``holdout``, spread evenly over it, are left out; ``seed`` decides the order.

    Raises:
        InputError: nothing is left to train on.
    """

    samples: int
    holdout: int
    seed: int

    def __post_init__(self) -> None:
        if self.holdout >= self.samples:
            raise InputError(
                f"{self.samples} samples with holdout={self.holdout}: nothing is left to train on; give more shards, "
                "or hold out fewer"
            )

    def __len__(self) -> int:
        return self.samples - self.holdout

    def held_out(self) -> list[int]:
        """Numbers in the plan of the samples that are held out, ascending."""
        return [(2 * place + 1) * self.samples // (2 * self.holdout) for place in range(self.holdout)]

    def drawn(self, position: int) -> Iterator[int]:
        """The number in the plan of what is drawn at ``position``, and those that stand in for it, the next first.

        Positions count from the first image of the first step on. Each sample of the epoch comes once.
        """
        epoch, place = divmod(position, len(self))
        order = _permutation(len(self), self.seed, epoch)
        held_out = np.array(self.held_out(), np.int64)
        before = held_out - np.arange(self.holdout)
        for offset in range(len(self)):
            number = int(order[(place + offset) % len(self)])
            yield number + int(np.searchsorted(before, number, side="right"))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True, eq=False)
class Draw:
    """An image, uint8 ``[H, W, 3]``, and why others, by their number in the plan, could not be had in its place."""

    image: NDArray[np.uint8]
    failures: dict[int, str]


def load_draw(plan: Plan, numbers: Iterable[int], options: DecodeOptions) -> Draw:
    """The first of some samples that can be decoded.

    Raises:
        InputError: none can.
    """
    failures: dict[int, str] = {}
    for number in numbers:
        shard, position = plan.sample(number)
        index = plan.index(shard)
        try:
            return Draw(load_sample(index, position, options).image, failures)
        except SampleError as error:
            failures[number] = f"{index.samples[position].key} of {plan.shards[shard].url}: {error}"
    raise InputError(
        f"not one of {len(failures)} samples can be decoded: {'; '.join(list(failures.values())[:3])}; look at the "
        "shards"
    )


def step_batches(
    plan: Plan, order: SampleOrder, options: DecodeOptions, batch: int, share: range, steps: range, threads: int
) -> Iterator[list[Draw]]:
    """The images of one worker, step by step, decoded ahead of time.

    Args:
        plan, order, options: Where the samples are, how they follow each other, and how they are decoded.
        batch: Images in a step, over all workers.
        share: This worker's places in it.
        steps: The steps to do, counted from 1.
        threads: Decode so many images at once.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[list[Future[Draw]]] = deque()
        try:
            for step in steps:
                places = [(step - 1) * batch + place for place in share]
                pending.append([pool.submit(load_draw, plan, order.drawn(place), options) for place in places])
                if len(pending) > _STEPS_AHEAD:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step, counted from 1."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))


def make_objective(config: TrainConfig, backbone: Backbone) -> MultiViewObjective:
    """What is trained, on the CPU, with the first weights that the seed gives."""
    torch.manual_seed(seeded(config.seed, _WEIGHTS).initial_seed())
    downsampler = (
        AttentionDownsampler(backbone.channels, backbone.stride, backbone.stride)
        if config.downsampler == "attention"
        else BlurDownsampler(backbone.stride, backbone.stride)
    )
    return MultiViewObjective(
        create_trainable(
            config.upsampler,
            backbone.channels,
            config.kernel,
            (config.start_space, config.start_colour),
            min(config.feature_keys, backbone.channels),
            config.coarse_stages,
            config.bicubic_a,
        ),
        downsampler,
        jitter=Jitter(config.max_pad, (1.0, config.max_zoom)),
        jitters=config.jitters,
        projections=config.projections,
        crf=config.crf,
        total_variation=config.total_variation,
        magnitude=config.magnitude,
        precision=getattr(torch, config.precision),
    )


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
    backbone = _described(config, make_backbone(config))
    identity = config.identity() | {"backbone digest": backbone["digest"]}
    identity |= {"input shards": len(shards), "input samples": plan.samples, "input digest": plan.digest}
    _check_run(config, identity)
    provenance = {"identity": identity, "config": describe(config), "backbone": backbone, "versions": versions()}
    storage.write_atomic(_run_place(config), json.dumps({"format": _FORMAT, **provenance}).encode())
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


def _described(config: TrainConfig, backbone: Backbone) -> dict[str, Any]:
    """What is known of the backbone, and of its map for images of this size."""
    return {
        "name": backbone.name,
        "layer": backbone.layer,
        "channels": backbone.channels,
        "stride": list(backbone.stride),
        "grid": list(backbone.grid(config.size)),
        "norm": backbone.norm,
        "digest": backbone.digest,
    }


def _train_worker(arguments: Mapping[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    _Worker(arguments["config"], arguments["plan"], arguments["provenance"]).run()


class _Worker:
    """One of the processes that train; the first one evaluates and writes for all."""

    def __init__(self, config: TrainConfig, plan: Plan, provenance: Mapping[str, Any]) -> None:
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.config, self.plan, self.provenance = config, plan, provenance
        self.threads = set_threads(config.threads, context.get_local_world_size())
        self.device = ray.train.torch.get_device()
        self.backbone = make_backbone(config).to(self.device)
        if self.backbone.digest != provenance["backbone"]["digest"]:
            raise StoreError(
                f"worker {self.rank} has a {config.backbone} with weights {self.backbone.digest[:12]}..., the run is "
                f"for {provenance['backbone']['digest'][:12]}...; give every node the same weight files"
            )
        self.order = SampleOrder(plan.samples, config.holdout, config.seed)
        self.options = image_options(config, self.backbone.mean)
        self.objective = make_objective(config, self.backbone).to(self.device)
        kind = torch.optim.NAdam if config.optimiser == "nadam" else torch.optim.AdamW
        self.optimiser: torch.optim.Optimizer = kind(self.objective.parameters(), lr=config.lr)
        self.step, self.best_step = 0, 0
        self.best: float | None = None
        self.failures: dict[int, str] = {}
        self.failed_draws = 0
        self._new_failures: dict[int, str] = {}
        self._new_failed_draws = 0
        self._restore()

    def run(self) -> None:
        config = self.config
        model = ray.train.torch.prepare_model(
            self.objective,
            # A nearer size runs fewer stages than the stack has: the others get no gradient.
            parallel_strategy_kwargs={"find_unused_parameters": True},
        )
        if self.step and self.rank == 0:
            _say(f"going on after step {self.step}, from its checkpoint")
        if not self.step:
            self._fit_feature_keys()
        held_out = self._load_held_out() if self.rank == 0 else []
        log = read_log(config.out, self.step) if self.step else []
        board = self._open_board()
        if not self.step and self.rank == 0:
            log.append(self._first_line(held_out))
        share = config.batch_size // self.workers
        first = self.rank * share
        batches = step_batches(
            self.plan,
            self.order,
            self.options,
            config.batch_size,
            range(first, first + share),
            range(self.step + 1, config.steps + 1),
            max(2, self.threads),
        )
        progress = StepProgress(self.step, config.steps)
        started = time.perf_counter()
        for draws in batches:
            self.step += 1
            for draw in draws:
                self._new_failures |= draw.failures
                self._new_failed_draws += bool(draw.failures)
            line: dict[str, Any] = {"step": self.step, **self._update(model, draws, first)}
            last = self.step == config.steps
            if self.rank == 0:
                if last or self.step % config.evaluate_every == 0:
                    line["explained_variance"] = self._evaluate(held_out, line)
                line["seconds"] = round(time.perf_counter() - started, 4)
                log.append(line)
                if board is not None:
                    for name in line.keys() - {"step", "seconds"}:
                        board.add_scalar(name, line[name], self.step)
                progress.add(self.step, line["loss"])
            started = time.perf_counter()
            if last or self.step % config.checkpoint_every == 0:
                self._checkpoint(log)
        if board is not None:
            board.close()

    def _update(self, model: torch.nn.Module, draws: Sequence[Draw], first: int) -> dict[str, float]:
        """One step of the optimiser; the terms of the loss, as means over all workers."""
        config, step = self.config, self.step
        images = torch.from_numpy(np.stack([draw.image for draw in draws])).to(self.device)
        torch.manual_seed(seeded(config.seed, _DROPOUT, step, self.rank).initial_seed())
        terms: dict[str, Tensor] = model(self.backbone, images, config.seed, step, first)
        self.optimiser.zero_grad()
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        self.optimiser.step()
        values = torch.stack([term.detach() for term in terms.values()])
        if self.workers > 1:
            torch.distributed.all_reduce(values)
            values /= self.workers
        found = dict(zip(terms, values.tolist(), strict=True))
        if not math.isfinite(found["loss"]):
            raise JobFailedError(
                f"the loss of step {step} is {found}, after which nothing can be learned. Likely cause: lr={config.lr} "
                "is too high, or features out of range; start anew with a lower one, or with norm=layer"
            )
        return found

    def _fit_feature_keys(self) -> None:
        """What a JBU compares of the features, from the first images of the order: the same in every worker."""
        upsampler = self.objective.upsampler
        if not (isinstance(upsampler, JBU) and upsampler.feature_keys):
            return
        fit = PCAFit(self.backbone.channels)
        for position in range(min(_KEY_IMAGES, len(self.order))):
            try:
                image = load_draw(self.plan, [next(self.order.drawn(position))], self.options).image
            except InputError:
                continue  # Counted where it is trained on.
            with torch.no_grad():
                fit.add(self.backbone(torch.from_numpy(image)[None].to(self.device)))
        pca = fit.solve(upsampler.feature_keys)
        upsampler.set_feature_keys(pca.components, pca.variance)

    def _load_held_out(self) -> list[Tensor]:
        """The images held out that can be decoded, in batches."""
        images = []
        for number in self.order.held_out():
            try:
                images.append(load_draw(self.plan, [number], self.options).image)
            except InputError as error:
                self._new_failures[number] = str(error)
        if not images:
            raise InputError(
                f"not one of the {self.config.holdout} samples held out can be decoded: "
                f"{next(iter(self._new_failures.values()))}"
            )
        groups = [images[at : at + _EVALUATION_BATCH] for at in range(0, len(images), _EVALUATION_BATCH)]
        return [torch.from_numpy(np.stack(group)) for group in groups]

    def _first_line(self, held_out: Sequence[Tensor]) -> dict[str, Any]:
        """How well the features are explained before the first step, and by bilinear interpolation."""
        objective = self.objective
        plain = MultiViewObjective(
            Interpolate("bilinear"),
            BlurDownsampler(self.backbone.stride, self.backbone.stride),
            jitter=objective.jitter,
            jitters=objective.jitters,
            projections=objective.projections,
            precision=objective.precision,
        ).to(self.device)
        moved = [images.to(self.device) for images in held_out]
        bilinear = plain.evaluate(self.backbone, moved, self.config.seed)
        untrained = objective.evaluate(self.backbone, moved, self.config.seed)
        _say(f"explained variance on images held out: {bilinear:.4f} by bilinear interpolation and plain means")
        return {"step": 0, "explained_variance": untrained, "bilinear": bilinear}

    def _evaluate(self, held_out: Sequence[Tensor], line: Mapping[str, Any]) -> float:
        """The explained variance now; where it is the best so far, the upsampler is kept."""
        moved = [images.to(self.device) for images in held_out]
        score = self.objective.evaluate(self.backbone, moved, self.config.seed)
        _say(f"step {self.step}  explained variance on images held out: {score:.4f}")
        if self.best is None or score > self.best:
            self.best, self.best_step = score, self.step
            self._write_upsampler("best", {**line, "explained_variance": score})
        return score

    def _write_upsampler(self, name: str, line: Mapping[str, Any]) -> None:
        data = upsampler_bytes(self.objective.upsampler, **self.provenance, log=dict(line))
        storage.write_atomic(storage.join(self.config.out, f"{name}.safetensors"), data)

    def _open_board(self) -> Any:
        if not self.config.tensorboard or self.rank:
            return None
        from tensorboardX import SummaryWriter

        folder = storage.join(storage.local_path(self.config.out), "tensorboard")
        return SummaryWriter(folder, purge_step=self.step + 1)

    def _checkpoint(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Log and upsampler first, then the checkpoint that says they are there."""
        self._gather_failures()
        done = {"step": self.step, "best": self.best, "best_step": self.best_step, "failed_draws": self.failed_draws}
        lost = list(self.failures.values())
        metrics = {**done, "failed_samples": len(lost), "failures": lost[:_FAILURES_TOLD]}
        if self.rank:
            ray.train.report(metrics)
            return
        write_log(self.config.out, log)
        self._write_upsampler("last", log[-1])
        _copy_snapshot(self.config)
        with tempfile.TemporaryDirectory(prefix="featup-") as folder:
            state = {**done, "failures": self.failures, "objective": self.objective.state_dict()}
            torch.save({**state, "optimiser": self.optimiser.state_dict()}, Path(folder) / "state.pt")
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location=self.device, weights_only=True)
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name in ("step", "best", "best_step", "failed_draws", "failures"):
            setattr(self, name, state[name])

    def _gather_failures(self) -> None:
        """Every worker's failures since the last checkpoint, added to those before it."""
        mine = (self._new_failures, self._new_failed_draws)
        all_of_them: list[Any] = [mine]
        if self.workers > 1:
            all_of_them = [None] * self.workers
            torch.distributed.all_gather_object(all_of_them, mine)
        for failures, draws in all_of_them:
            self.failures |= failures
            self.failed_draws += draws
        self.failures = dict(sorted(self.failures.items()))
        self._new_failures, self._new_failed_draws = {}, 0


def _say(text: str) -> None:
    # Ray Train's workers say twice what goes through print.
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_log(out: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write ``OUT/log.jsonl``, whole: object stores cannot append, and readers never see half a line."""
    storage.write_atomic(storage.join(out, "log.jsonl"), "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_log(out: str, step: int) -> list[dict[str, Any]]:
    """The lines of ``OUT/log.jsonl`` up to a step, from step 0 on.

    Raises:
        StoreError: lines are missing: the log is older than the checkpoint, or was changed.
    """
    place = storage.join(out, "log.jsonl")
    lines = [json.loads(line) for line in storage.read_bytes(place).splitlines()] if storage.exists(place) else []
    lines = [line for line in lines if line["step"] <= step]
    if [line["step"] for line in lines] != list(range(step + 1)):
        raise StoreError(
            f"{place} does not hold a line for each of the steps 0 to {step} that the last checkpoint has behind it: "
            "it was changed or removed; put it back, or start anew in another --out"
        )
    return lines


def plot_log(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The loss and the explained variance over the steps, as a PNG.

    Args:
        lines: Of the log, from step 0 on.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in lines[1:]]
    losses = np.array([line["loss"] for line in lines[1:]])
    left.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    ends = np.linspace(0, len(losses), min(len(losses), 50) + 1).astype(int)
    parts = [slice(start, stop) for start, stop in pairwise(ends)]
    means = [(np.mean(steps[part]), losses[part].mean()) for part in parts]
    left.plot(*zip(*means, strict=True), label="means")
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    scores = [(line["step"], line["explained_variance"]) for line in lines if "explained_variance" in line]
    right.plot(*zip(*scores, strict=True), marker=".", label="trained")
    right.axhline(lines[0]["bilinear"], color="0.5", linestyle="--", label="bilinear")
    right.set(xlabel="step", ylabel="explained variance, images held out")
    right.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()

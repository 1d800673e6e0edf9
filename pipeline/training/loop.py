"""The training loop of a learned upsampler, as each worker runs it.

What connects the workers, and keeps their checkpoints, is a :class:`Session`; nothing here knows what is behind it.
"""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from featup.checkpoints import upsampler_bytes
from featup.training.objective import HeldOut, Objective, seeded
from featup.upsamplers import AnyUp
from pipeline.compute.device import set_threads
from pipeline.compute.load import image_options
from pipeline.config.train import TrainConfig
from pipeline.errors import InputError, JobFailedError, StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.options import Size
from pipeline.training.batches import TrainingImage, load_image, step_batches
from pipeline.training.create import create_baseline, create_objective, make_backbones
from pipeline.training.log import read_log, write_log
from pipeline.training.order import SampleOrder, count_held_out
from pipeline.training.progress import print_line

__all__ = ["Session", "TrainingWorker", "learning_rate"]


_EVALUATION_BATCH = 4
_LISTED_FAILURES = 10
# Purpose of torch's own generator, beside that of the initial weights.
_DROPOUT = 101


class Session(Protocol):
    """A worker's connection with the other workers, and with the run's checkpoints."""

    rank: int
    workers: int
    workers_here: int
    device: torch.device

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, with its gradients averaged over the workers."""
        ...

    def last_checkpoint(self) -> AbstractContextManager[str | None]:
        """The folder of the last checkpoint, ``None`` where there is none."""
        ...

    def before_checkpoint(self) -> None:
        """Called by the first worker before it reports a checkpoint."""
        ...

    def show_step(self, step: int, loss: float) -> None:
        """Called by the first worker after each step: how far the run is."""
        ...

    def report(self, metrics: dict[str, Any], checkpoint: str | None = None) -> None:
        """Report metrics, and from the first worker the folder of a checkpoint. Every worker reports each time."""
        ...


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step, counted from 1."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))


def _named(found: HeldOut) -> dict[str, float]:
    return {"held_out_loss": found.loss, "explained_variance": found.explained_variance}


class TrainingWorker:
    """One of the processes that train; the first one evaluates and writes for all."""

    def __init__(self, config: TrainConfig, plan: Plan, provenance: Mapping[str, Any], session: Session) -> None:
        """
        Args:
            config, plan: The run's options and its samples.
            provenance: The run's identity, config, backbones and versions.
            session: Connects this worker with the others.

        Raises:
            StoreError: the backbone's weights here are not those of the run.
        """
        self.session = session
        self.rank, self.workers = session.rank, session.workers
        self.config, self.plan, self.provenance = config, plan, provenance
        self.threads = set_threads(config.threads, session.workers_here)
        self.device = session.device
        self.backbones = [backbone.to(self.device) for backbone in make_backbones(config)]
        for backbone, described in zip(self.backbones, provenance["backbones"], strict=True):
            if backbone.digest != described["digest"]:
                raise StoreError(
                    f"worker {self.rank} has a {backbone.name} with weights {backbone.digest[:12]}..., the run is for "
                    f"{described['digest'][:12]}...; give every node the same weight files"
                )
        self.order = SampleOrder(plan.samples, count_held_out(config.holdout, plan.samples), config.seed)
        self.objective = create_objective(config, self.backbones[0]).to(self.device)
        height, width = (side * self.objective.detail for side in config.size)
        self.options = replace(image_options(config, self.backbones[0].mean), size=Size(height, width))
        kind = torch.optim.NAdam if config.optimiser == "nadam" else torch.optim.AdamW
        self.optimiser: torch.optim.Optimizer = kind(self.objective.parameters(), lr=config.lr)
        self.step, self.best_step = 0, 0
        self.best: float | None = None
        self.failures: dict[int, str] = {}
        self.replaced = 0
        self._new_failures: dict[int, str] = {}
        self._new_replaced = 0
        self._restore()

    def run(self) -> None:
        """Every step from the last checkpoint on."""
        config = self.config
        model = self.session.prepare(self.objective)
        if self.step and self.rank == 0:
            print_line(f"going on after step {self.step}, from its checkpoint")
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
        started = time.perf_counter()
        for batch in batches:
            self.step += 1
            for loaded in batch:
                self._new_failures |= loaded.failures
                self._new_replaced += bool(loaded.failures)
            line: dict[str, Any] = {"step": self.step, **self._update(model, batch, first)}
            last = self.step == config.steps
            if self.rank == 0:
                if last or self.step % config.evaluate_every == 0:
                    line |= self._evaluate(held_out, line)
                if last:
                    line["worse_than_bilinear"] = line["held_out_loss"] > log[0]["bilinear"]["held_out_loss"]
                line["seconds"] = round(time.perf_counter() - started, 4)
                log.append(line)
                if board is not None:
                    for name in line.keys() - {"step", "seconds"}:
                        board.add_scalar(name, line[name], self.step)
                self.session.show_step(self.step, line["loss"])
            started = time.perf_counter()
            if last or self.step % config.checkpoint_every == 0:
                self._checkpoint(log)
        if board is not None:
            board.close()

    def _update(self, model: torch.nn.Module, batch: Sequence[TrainingImage], first: int) -> dict[str, float]:
        """One step of the optimiser; the terms of the loss, as means over all workers."""
        config, step = self.config, self.step
        images = torch.from_numpy(np.stack([loaded.image for loaded in batch])).to(self.device)
        torch.manual_seed(seeded(config.seed, _DROPOUT, step, self.rank).initial_seed())
        backbone = self.backbones[step % len(self.backbones)]
        terms: dict[str, Tensor] = model(backbone, images, config.seed, step, first)
        self.optimiser.zero_grad()
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        if step <= config.clip_steps:
            # As the original: the moments of the first, large gradients would slow down what follows.
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), config.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        self.optimiser.step()
        values = torch.stack([term.detach() for term in terms.values()])
        if self.workers > 1:
            torch.distributed.all_reduce(values)
            values /= self.workers
        means = dict(zip(terms, values.tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise JobFailedError(
                f"the loss of step {step} is {means}, after which nothing can be learned. Likely cause: lr={config.lr} "
                "is too high, or features out of range; start anew with a lower one, or with norm=layer"
            )
        return means

    def _load_held_out(self) -> list[Tensor]:
        """The held-out images that can be decoded, in batches."""
        images = []
        for number in self.order.held_out():
            try:
                images.append(load_image(self.plan, [number], self.options).image)
            except InputError as error:
                self._new_failures[number] = str(error)
        if not images:
            raise InputError(
                f"not one of the {self.order.holdout} held-out samples can be decoded: "
                f"{next(iter(self._new_failures.values()))}"
            )
        groups = [images[at : at + _EVALUATION_BATCH] for at in range(0, len(images), _EVALUATION_BATCH)]
        return [torch.from_numpy(np.stack(group)) for group in groups]

    def _first_line(self, held_out: Sequence[Tensor]) -> dict[str, Any]:
        """The held-out loss before the first step, and that of the bilinear baseline."""
        baselines = [create_baseline(self.config, backbone).to(self.device) for backbone in self.backbones]
        bilinear = self._mean_over_backbones(baselines, held_out)
        untrained = self._mean_over_backbones([self.objective] * len(self.backbones), held_out)
        print_line(
            f"held-out loss {untrained.loss:.4f} before training, {bilinear.loss:.4f} by bilinear interpolation "
            f"(explained variance {untrained.explained_variance:.4f}, {bilinear.explained_variance:.4f})"
        )
        return {"step": 0, **_named(untrained), "bilinear": _named(bilinear)}

    def _evaluate(self, held_out: Sequence[Tensor], line: Mapping[str, Any]) -> dict[str, float]:
        """The held-out loss now; where it is the least so far, the upsampler is written as the best.

        The criterion is the error that training minimises, on images that are never trained on, in views (or crops)
        and projections that are the same each time. It needs no labels. Regularisers are left out, as they do not tell
        how well features are predicted, and so is the uncertainty, which is no part of the upsampler: the loss of the
        views is their mean squared error, and the order is that of their explained variance.
        """
        found = self._mean_over_backbones([self.objective] * len(self.backbones), held_out)
        print_line(
            f"step {self.step}  held-out loss {found.loss:.4f}, explained variance {found.explained_variance:.4f}"
        )
        if self.best is None or found.loss < self.best:
            self.best, self.best_step = found.loss, self.step
            self._write_upsampler("best", {**line, **_named(found)})
        return _named(found)

    def _mean_over_backbones(self, objectives: Sequence[Objective], held_out: Sequence[Tensor]) -> HeldOut:
        batches = [images.to(self.device) for images in held_out]
        found = [
            objective.evaluate(backbone, batches, self.config.seed)
            for objective, backbone in zip(objectives, self.backbones, strict=True)
        ]
        return HeldOut(*(math.fsum(values) / len(values) for values in zip(*found, strict=True)))

    def _write_upsampler(self, name: str, line: Mapping[str, Any]) -> None:
        upsampler = self.objective.upsampler
        provenance = dict(self.provenance)
        if not isinstance(upsampler, AnyUp):
            # Precompute compares this with its own; AnyUp serves any backbone.
            provenance["backbone"] = provenance["backbones"][0]
        data = upsampler_bytes(upsampler, **provenance, log=dict(line))
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
        done = {"step": self.step, "best": self.best, "best_step": self.best_step, "replaced": self.replaced}
        reasons = list(self.failures.values())
        metrics = {**done, "failed_samples": len(reasons), "failures": reasons[:_LISTED_FAILURES]}
        if self.rank:
            self.session.report(metrics)
            return
        write_log(self.config.out, log)
        self._write_upsampler("last", log[-1])
        self.session.before_checkpoint()
        with tempfile.TemporaryDirectory(prefix="featup-") as folder:
            state = {**done, "failures": self.failures, "objective": self.objective.state_dict()}
            torch.save({**state, "optimiser": self.optimiser.state_dict()}, Path(folder) / "state.pt")
            self.session.report(metrics, folder)

    def _restore(self) -> None:
        with self.session.last_checkpoint() as folder:
            if folder is None:
                return
            state = torch.load(Path(folder) / "state.pt", map_location=self.device, weights_only=True)
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name in ("step", "best", "best_step", "replaced", "failures"):
            setattr(self, name, state[name])

    def _gather_failures(self) -> None:
        """Every worker's failures since the last checkpoint, added to those before it."""
        own = (self._new_failures, self._new_replaced)
        gathered: list[Any] = [own]
        if self.workers > 1:
            gathered = [None] * self.workers
            torch.distributed.all_gather_object(gathered, own)
        for failures, replaced in gathered:
            self.failures |= failures
            self.replaced += replaced
        self.failures = dict(sorted(self.failures.items()))
        self._new_failures, self._new_replaced = {}, 0

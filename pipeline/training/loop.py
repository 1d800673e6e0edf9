"""The training loop of a learned upsampler, as each worker runs it.

What connects the workers, and keeps their checkpoints, is a :class:`Session`; nothing here knows what is behind it.
"""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.checkpoints import upsampler_bytes
from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler
from featup.multiview.views import Jitter
from featup.projection import PCAFit
from featup.training.objective import MultiViewObjective, seeded
from featup.upsamplers import JBU, Interpolate, create_trainable
from pipeline.compute.device import set_threads
from pipeline.compute.load import image_options
from pipeline.compute.models import make_backbone
from pipeline.config.train import TrainConfig
from pipeline.errors import InputError, JobFailedError, StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.training.batches import TrainingImage, load_image, step_batches
from pipeline.training.log import read_log, write_log
from pipeline.training.order import SampleOrder, count_held_out
from pipeline.training.progress import print_line

__all__ = ["Session", "TrainingWorker", "create_objective", "describe_backbone", "learning_rate"]


_EVALUATION_BATCH = 4
_LISTED_FAILURES = 10
_KEY_IMAGES = 256
# Purposes of torch's own generator; featup.training has smaller numbers for the purposes of the others.
_WEIGHTS, _DROPOUT = 100, 101


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


def create_objective(config: TrainConfig, backbone: Backbone) -> MultiViewObjective:
    """The modules to train, on the CPU, with the initial weights of the seed."""
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


def describe_backbone(config: TrainConfig, backbone: Backbone) -> dict[str, Any]:
    """The backbone's name, weights and map for images of this size, as a run records them."""
    return {
        "name": backbone.name,
        "layer": backbone.layer,
        "channels": backbone.channels,
        "stride": list(backbone.stride),
        "grid": list(backbone.grid(config.size)),
        "norm": backbone.norm,
        "digest": backbone.digest,
    }


class TrainingWorker:
    """One of the processes that train; the first one evaluates and writes for all."""

    def __init__(self, config: TrainConfig, plan: Plan, provenance: Mapping[str, Any], session: Session) -> None:
        """
        Args:
            config, plan: The run's options and its samples.
            provenance: The run's identity, config, backbone and versions.
            session: Connects this worker with the others.

        Raises:
            StoreError: the backbone's weights here are not those of the run.
        """
        self.session = session
        self.rank, self.workers = session.rank, session.workers
        self.config, self.plan, self.provenance = config, plan, provenance
        self.threads = set_threads(config.threads, session.workers_here)
        self.device = session.device
        self.backbone = make_backbone(config).to(self.device)
        if self.backbone.digest != provenance["backbone"]["digest"]:
            raise StoreError(
                f"worker {self.rank} has a {config.backbone} with weights {self.backbone.digest[:12]}..., the run is "
                f"for {provenance['backbone']['digest'][:12]}...; give every node the same weight files"
            )
        self.order = SampleOrder(plan.samples, count_held_out(config.holdout, plan.samples), config.seed)
        self.options = image_options(config, self.backbone.mean)
        self.objective = create_objective(config, self.backbone).to(self.device)
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
                    line["explained_variance"] = self._evaluate(held_out, line)
                if last:
                    line["worse_than_bilinear"] = line["explained_variance"] < log[0]["bilinear"]
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
        means = dict(zip(terms, values.tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise JobFailedError(
                f"the loss of step {step} is {means}, after which nothing can be learned. Likely cause: lr={config.lr} "
                "is too high, or features out of range; start anew with a lower one, or with norm=layer"
            )
        return means

    def _fit_feature_keys(self) -> None:
        """Fit the features' components that a JBU compares, to the first images of the order: alike in every worker."""
        upsampler = self.objective.upsampler
        if not (isinstance(upsampler, JBU) and upsampler.affinity_channels):
            return
        fit = PCAFit(self.backbone.channels)
        for position in range(min(_KEY_IMAGES, len(self.order))):
            try:
                image = load_image(self.plan, [next(self.order.candidates(position))], self.options).image
            except InputError:
                continue  # Counted where the sample comes in training.
            with torch.no_grad():
                fit.add(self.backbone(torch.from_numpy(image)[None].to(self.device)))
        pca = fit.solve(upsampler.affinity_channels)
        upsampler.set_affinity_projection(pca.components, pca.variance)

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
        """The explained variance before the first step, and that of the bilinear baseline."""
        objective = self.objective
        baseline = MultiViewObjective(
            Interpolate("bilinear"),
            BlurDownsampler(self.backbone.stride, self.backbone.stride),
            jitter=objective.jitter,
            jitters=objective.jitters,
            projections=objective.projections,
            precision=objective.precision,
        ).to(self.device)
        batches = [images.to(self.device) for images in held_out]
        bilinear = baseline.evaluate(self.backbone, batches, self.config.seed)
        untrained = objective.evaluate(self.backbone, batches, self.config.seed)
        print_line(f"explained variance on held-out images: {bilinear:.4f} by bilinear interpolation and patch means")
        return {"step": 0, "explained_variance": untrained, "bilinear": bilinear}

    def _evaluate(self, held_out: Sequence[Tensor], line: Mapping[str, Any]) -> float:
        """The explained variance now; where it is the best so far, the upsampler is written as the best."""
        batches = [images.to(self.device) for images in held_out]
        score = self.objective.evaluate(self.backbone, batches, self.config.seed)
        print_line(f"step {self.step}  explained variance on held-out images: {score:.4f}")
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

"""Feature stores that tests of probes are fitted on, and the training loop without Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.compute.prepare import plan_input
from pipeline.config.base import describe
from pipeline.config.precompute import PrecomputeConfig
from pipeline.config.train import TrainConfig
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.options import Size
from pipeline.store.create import create_store
from pipeline.store.layout import OK, Layout
from pipeline.store.writer import StoreWriter
from pipeline.training.create import describe_backbones, make_backbones
from pipeline.training.loop import Session, TrainingWorker
from tests.pipeline.store.support import finish_store

SIZE = (6, 10)
TRUTH = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
DEPTH = torch.tensor([0.5, -0.25, 0.0, 1.0, 0.125])


def write_store(
    url: str,
    blocks: dict[str, NDArray[Any]],
    tile: tuple[int, int],
    digests: dict[str, str] | None = None,
    norm: Literal["model", "layer"] = "model",
) -> str:
    """A complete store of one unit, with these features ``[N, H, W, C]``, ``seg`` and ``depth`` ``[N, H, W]``."""
    images, height, width, channels = blocks["features"].shape
    layout = Layout(
        rows=images,
        rows_per_shard=images,
        height=height,
        width=width,
        channels=channels,
        tile=tile,
        labels=("seg", "depth"),
        seg_dtype="uint8",
        valid_mask=False,
        compression_level=1,
    )
    options: dict[str, Any] = {"size": Size(height, width), "labels": ("seg", "depth"), "norm": norm}
    config = PrecomputeConfig(shards=("a.tar",), out=url, **options)
    setup: dict[str, Any] = {"layer": 11, "channels": channels, "mean": [0.5] * 3, "std": [0.5] * 3}
    setup["digests"] = {"backbone": "weights", **(digests or {})}
    create_store(url, layout, {"config": describe(config), "setup": setup, "identity": {}})
    status = np.full(images, OK, np.uint8)
    StoreWriter(url, layout).write(UnitKey(unit=0, shard=0, start=0, stop=images, row=0), {**blocks, "status": status})
    finish_store(url, [status.tolist()], rows=images)
    return url


def linear_store(url: str, images: int, seed: int, **options: Any) -> str:
    """A store whose labels are linear in its features, but for pixels without a label, where features mislead."""
    features = torch.randn(images, *SIZE, 5, generator=torch.Generator().manual_seed(seed)).half()
    seg = (features.float() @ TRUTH.T).argmax(-1).to(torch.uint8).numpy()
    depth = (features.float() @ DEPTH + 6).numpy()
    stored = features.numpy().copy()
    seg[:, :2], depth[:, :2], stored[:, :2] = 255, np.nan, 50 * stored[:, :2]
    return write_store(url, {"features": stored, "seg": seg, "depth": depth}, SIZE, **options)


class InterruptedRunError(Exception):
    """What ends a run in its midst."""


class LocalSession(Session):
    """One worker, whose checkpoints are copies in a folder."""

    rank = 0
    workers = 1
    workers_here = 1
    device = torch.device("cpu")

    def __init__(self, folder: Path, last_step: int) -> None:
        self.folder, self.last_step = folder, last_step
        self.metrics: list[dict[str, Any]] = []
        self.steps: list[int] = []

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    @contextmanager
    def last_checkpoint(self) -> Iterator[str | None]:
        yield str(self.folder) if self.folder.exists() else None

    def before_checkpoint(self) -> None:
        pass

    def show_step(self, step: int, loss: float) -> None:
        self.steps.append(step)

    def report(self, metrics: dict[str, Any], checkpoint: str | None = None) -> None:
        assert checkpoint is not None
        self.folder.mkdir(exist_ok=True)
        (self.folder / "state.pt").write_bytes((Path(checkpoint) / "state.pt").read_bytes())
        self.metrics.append(metrics)
        if metrics["step"] == self.last_step:
            raise InterruptedRunError


def train(config: TrainConfig, last_step: int = 0) -> LocalSession:
    """Train in this process, from the last checkpoint on where there is one, up to the checkpoint at ``last_step``."""
    out = Path(config.out)
    plan = Plan(plan_input(config), 1, str(out / "plan" / "index"))
    backbones = describe_backbones(config, make_backbones(config))
    session = LocalSession(out / "checkpoint", last_step)
    TrainingWorker(config, plan, {"backbones": backbones}, session).run()
    return session

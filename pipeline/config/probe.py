"""Options of ``jobs.train_probe``."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Literal

from pipeline.config.base import Checked, option

__all__ = ["ProbeConfig"]


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Checked):
    """Options of ``jobs.train_probe``: a store of features and labels in, a linear probe out."""

    store: str = option(MISSING, "the feature store to fit on: what was --out of jobs.precompute")
    val_store: str | None = option(None, "another store, to evaluate on")
    out: str = option(MISSING, "the probe: a .safetensors file")
    label: Literal["seg", "depth"] = option("seg", "which of the store's labels: seg or depth")
    classes: int | None = option(None, "seg: how many classes there are")
    ignore_index: int = option(255, "seg: the class id of pixels without a label")
    pixels: int = option(200, "pixels of every image that the probe is fitted on, fewer where there are many images")
    max_vectors: int = option(400_000, "pixels in all that the probe is fitted on, at most")
    seed: int = option(0, "of the pixels that are drawn")
    workers: int = option(2, "processes that read the store", run=True)
    batch_size: int = option(8, "images read at once by each of them", run=True)
    threads: int | None = option(None, "threads of the fit; by default the machine's cores", run=True)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        counts = ("pixels", "max_vectors", "batch_size", "threads", "classes")
        return [
            (
                (self.label == "seg") != (self.classes is not None),
                f"label={self.label!r} with classes={self.classes}: seg needs the number of classes, depth has none",
            ),
            (not self.out.endswith(".safetensors"), f"out={self.out!r} must end in .safetensors"),
            *(
                (
                    getattr(self, name) is not None and getattr(self, name) < 1,
                    f"{name}={getattr(self, name)} must be at least 1",
                )
                for name in counts
            ),
            (self.workers < 0 or self.seed < 0, f"workers={self.workers} and seed={self.seed} must be 0 or more"),
        ]

"""Options of ``featup train_probe``."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Literal

from pipeline.config.base import LARGEST_SEED
from pipeline.options import Checked, option

__all__ = ["ProbeConfig"]


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Checked):
    """Options of ``featup train_probe``: a store of features and labels in, a linear probe out."""

    store: str = option(
        MISSING, "the feature store to fit on: the --out of featup precompute", group="input", path=True
    )
    val_store: str | None = option(None, "another store, to evaluate on", group="input", path=True)
    out: str = option(MISSING, "the probe: a .safetensors file", group="input", path=True)

    label: Literal["seg", "depth"] = option("seg", "which of the store's labels: seg or depth", group="probe")
    classes: int | None = option(None, "seg: number of classes", group="probe", at_least=1, at_most=65535)
    ignore_index: int = option(
        255, "seg: the class id of pixels without a label", group="probe", at_least=0, at_most=65535
    )
    names: str | None = option(
        None,
        "seg: a text file with a class in every line, its name and, if wanted, its colour: sky #87ceeb",
        group="probe",
        path=True,
    )
    pixels: int = option(
        200,
        "pixels sampled from every image to fit on, fewer where there are many images",
        group="probe",
        at_least=1,
    )
    max_vectors: int = option(400_000, "pixels in all to fit on, at most", group="probe", at_least=1)
    seed: int = option(0, "of the sampled pixels", group="probe", at_least=0, at_most=LARGEST_SEED)

    workers: int = option(2, "processes that read the store, 0 to read in this one", group="run", run=True, at_least=0)
    batch_size: int = option(8, "images read at once by each process", group="run", run=True, at_least=1)
    threads: int | None = option(
        None, "threads of the fit; by default the machine's cores", group="run", run=True, at_least=1
    )

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
            (
                (self.label == "seg") != (self.classes is not None),
                f"label={self.label!r} with classes={self.classes}: seg needs the number of classes, depth has none",
            ),
            (
                self.names is not None and self.classes is None,
                f"names={self.names!r} names classes, and label={self.label!r} has none; leave it out",
            ),
            (not self.out.endswith(".safetensors"), f"out={self.out!r} must end in .safetensors"),
        ]

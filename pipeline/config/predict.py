"""Options of ``featup predict``."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass

from pipeline.config.base import images_only
from pipeline.options import Checked, option

__all__ = ["PredictConfig"]


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Checked):
    """Options of ``featup predict``: a probe and photographs in, label or depth maps and pictures of them out."""

    probe: str = option(MISSING, "the probe: the --out of featup train_probe", group="input", path=True)
    images: tuple[str, ...] = option(
        (),
        "image files and folders, paths or fsspec URLs; of a folder, every image in it and below; also videos, lists, "
        "parquet files of images and saved Hugging Face data sets",
        group="input",
        path=True,
    )
    every: int = option(
        1, "of a video the first frame, and then every so many-th, is an image", group="input", at_least=1
    )
    image_column: str | None = option(
        None,
        "the column of images in lists, parquet files and data sets; by default image, or the only one",
        group="input",
    )
    shards: tuple[str, ...] = option(
        (),
        "instead of images: tar shards, with {0000..0099} braces and * globs; labels in them are compared",
        group="input",
        path=True,
    )
    limit: int | None = option(None, "use only so many images, spread evenly over the input", group="input", at_least=1)
    out: str = option(MISSING, "output: a folder or an fsspec URL", group="input", path=True)

    weights: str | None = option(
        None,
        "the backbone's weights (.safetensors, .pth, .npz); by default where they were when the probe was fitted",
        group="probe",
        path=True,
    )
    checkpoint: str | None = option(
        None, "of a trained upsampler; by default where it was when the probe was fitted", group="probe", path=True
    )
    names: str | None = option(
        None,
        "seg: a text file with a class in every line, its name and, if wanted, its colour: sky #87ceeb; by default the "
        "one that the probe was fitted with",
        group="probe",
        path=True,
    )
    sheet_images: int = option(24, "images of the contact sheet, spread over all", group="probe", at_least=0)

    max_pixels: int = option(
        100_000_000, "an image fails that has more pixels, by its header", group="decoding", at_least=1
    )
    max_bytes: int = option(256 << 20, "an image fails that has more encoded bytes", group="decoding", at_least=1)
    decode_timeout: float = option(
        60.0, "an image fails whose decoding takes longer, in seconds", group="decoding", above=0
    )

    batch_size: int = option(8, "images in one forward pass", group="run", run=True, at_least=1)
    threads: int | None = option(
        None, "threads that compute; by default the machine's cores", group="run", run=True, at_least=1
    )
    max_failed_fraction: float = option(
        0.01, "a larger fraction of failed images fails the job", group="run", run=True, at_least=0, at_most=1
    )

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
            (
                bool(self.images) == bool(self.shards),
                f"images={self.images} with shards={self.shards}: give one of them",
            ),
            images_only(self.images, self.every, self.image_column),
        ]

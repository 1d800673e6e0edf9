"""Options of ``featup precompute``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from featup.names import PerImageName, PublishedName, TrainableName, UpsamplerName
from pipeline.config.base import InputConfig, whole_gpus
from pipeline.config.bilateral import BilateralOptions
from pipeline.config.per_image import PerImageOptions
from pipeline.decode.options import LabelOptions
from pipeline.errors import Reason
from pipeline.options import Size, option

__all__ = ["PrecomputeConfig"]


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(PerImageOptions, BilateralOptions, LabelOptions, InputConfig):
    """Options of ``featup precompute``: shards of images in, a store of features out."""

    label_dir: tuple[str, ...] = option(
        (),
        "with images: KIND=FOLDER of the labels, in which a label has its image's relative name with another "
        "extension, such as seg=masks/",
        group="input",
        run=True,
        path=True,
    )

    upsampler: UpsamplerName | PerImageName = option(
        "bilateral",
        "nearest, bilinear, bicubic, bilateral (training-free); anyup (trained for any backbone); jbu, "
        "resize_conv, carafe, sapa, ifa (trained for one); multiview (the average of many views of every image, "
        "upsampled by --view-base); or implicit (a network fitted to every image)",
        group="upsampler",
    )
    checkpoint: str | None = option(
        None,
        "of a trained upsampler: our .safetensors, for jbu an official FeatUp .ckpt, for anyup an official state dict "
        "(by default the published one is downloaded)",
        group="upsampler",
        run=True,
        path=True,
    )
    output_size: Size | None = option(
        None,
        "size of the stored features, HEIGHTxWIDTH; by default that of the image",
        group="upsampler",
        at_least=1,
        at_most=16384,
    )
    views: int = option(
        16, "multiview: shifted views of an image, whose features are averaged", group="upsampler", at_least=1
    )
    view_base: UpsamplerName = option(
        "bilateral",
        "multiview: the upsampler of the average, any other than multiview and implicit; trained ones with their "
        "checkpoint",
        group="upsampler",
    )
    held_out_views: int = option(
        4,
        "multiview: further views that measure the explained variance in the index, or 0",
        group="upsampler",
        at_least=0,
    )

    pca: int | None = option(
        None, "store principal components, so many, instead of all channels", group="store", at_least=1
    )
    pca_images: int = option(256, "images the PCA is fitted on, spread over the data set", group="store", at_least=1)
    pca_from: str | None = option(
        None,
        "instead of pca: another store whose PCA is used, so that one probe serves both",
        group="store",
        run=True,
        path=True,
    )
    store_image: bool = option(
        True,
        "store the image as well, at the size of the features (uint8, 3 bytes a pixel)",
        group="store",
        before=False,
    )
    mantissa_bits: int | None = option(
        None,
        "bits of float16's mantissa that stored values are rounded to, to compress better",
        group="store",
        at_least=1,
        at_most=10,
    )
    tile: int | None = option(
        None,
        "side of a chunk in pixels, at most the longer side of the output; by default a quarter of its side, in "
        "chunks of at most 640 KiB, and more where they were of a few kilobytes",
        group="store",
        at_least=1,
    )
    rows_per_shard: int | None = option(
        None,
        "images in one Zarr shard; by default as many as keep it below 256 MiB",
        group="store",
        at_least=1,
        at_most=65536,
    )
    codec: Literal["lz4", "zstd", "none"] = option(
        "lz4",
        "compression, after bit-shuffling: lz4 is the faster one both ways; none is read faster still and stores about "
        "a seventh more",
        group="store",
        before="zstd",
    )
    compression_level: int = option(1, "of zstd", group="store", at_least=1, at_most=9)

    actors: int | Literal["auto"] = option(
        "auto",
        "processes that compute features: so many, or auto: one for each GPU or, without GPUs, for each core, as far "
        "as memory and work suffice",
        group="run",
        run=True,
        at_least=1,
    )
    gpus_per_actor: float | None = option(
        None,
        "GPUs of each actor: a fraction or a whole number; by default 1 where the cluster has GPUs, else 0",
        group="run",
        run=True,
        at_least=0,
    )
    cpus_per_actor: float | None = option(
        None,
        "CPU cores Ray reserves for each actor; by default 1, or less where the machine has not so many",
        group="run",
        run=True,
        at_least=0.01,
    )
    loader_cpus: float | None = option(
        None,
        "CPU cores Ray reserves for each reading and decoding task; by default 0.5, or less where the machine has not "
        "so many",
        group="run",
        run=True,
        at_least=0.01,
    )
    batch_size: int = option(8, "images in one forward pass", group="run", run=True, at_least=1)
    unit_attempts: int = option(
        3,
        "how often a unit is tried before it is listed as failed: failures count within a run, deaths of its process "
        "over all runs",
        group="run",
        run=True,
        at_least=1,
    )
    retry_failed: tuple[str, ...] | None = option(
        None,
        "compute failed samples again, those of the given reasons or, without a word, of all",
        group="run",
        run=True,
    )
    recheck_share: float = option(
        1.0,
        "share of finished samples whose bytes are compared where a shard's URL or time stamp changed",
        group="run",
        run=True,
        above=0,
        at_most=1,
    )

    def _checks(self) -> Sequence[tuple[bool, str]]:
        reasons = [reason.value for reason in Reason]
        return [
            *super()._checks(),
            *(
                (
                    kind not in self.labels or not folder,
                    f"label_dir={text!r} must be KIND=FOLDER, KIND one of --labels",
                )
                for text in self.label_dir
                for kind, _, folder in [text.partition("=")]
            ),
            (
                len({text.partition("=")[0] for text in self.label_dir}) != len(self.label_dir),
                f"label_dir={self.label_dir}: one kind is given two folders; put its labels below one",
            ),
            (
                bool(self.label_dir) and not self.images,
                f"label_dir={self.label_dir} goes with --images; in tars labels lie beside their image",
            ),
            (
                self.feed_forward not in get_args(PublishedName)
                and (self.feed_forward in get_args(TrainableName)) != (self.checkpoint is not None),
                f"upsampler={self.upsampler!r} with checkpoint={self.checkpoint!r}: those that are trained "
                f"({', '.join(get_args(TrainableName))}; multiview with one as view_base) need a checkpoint, "
                f"{', '.join(get_args(PublishedName))} may have one, the others take none",
            ),
            (
                self.pca is not None and self.pca_from is not None,
                f"pca={self.pca} fits a PCA and pca_from={self.pca_from!r} takes one that is there; give one of them",
            ),
            (
                self.tile is not None and self.tile > max(self.target_size),
                f"tile={self.tile} is larger than the stored features, {self.target_size} (HEIGHTxWIDTH); give at most "
                f"{max(self.target_size)}",
            ),
            whole_gpus("gpus_per_actor", self.gpus_per_actor),
            (
                self.cpus_per_actor is not None and self.cpus_per_actor == self.loader_cpus and not self.gpus_per_actor,
                f"cpus_per_actor and loader_cpus are both {self.loader_cpus}: Ray would then run reading and decoding "
                "inside the actors, one after the other; make them differ",
            ),
            (
                any(reason not in reasons for reason in self.retry_failed or ()),
                f"retry_failed={self.retry_failed} must be reasons that samples fail for: {', '.join(reasons)}",
            ),
        ]

    @property
    def feed_forward(self) -> UpsamplerName | None:
        """The feed-forward upsampler: that of the average for multiview, none for implicit."""
        if self.upsampler == "implicit":
            return None
        return self.view_base if self.upsampler == "multiview" else self.upsampler

    @property
    def fits_networks(self) -> bool:
        """See :attr:`PerImageOptions.fits_networks`."""
        return self.upsampler == "implicit"

    @property
    def per_image(self) -> bool:
        """Whether many views of each image go through the backbone."""
        return self.upsampler in get_args(PerImageName)

    @property
    def target_size(self) -> Size:
        """(height, width) of the stored features."""
        return self.output_size or self.size

    @property
    def projects(self) -> bool:
        """Whether principal components are stored in place of the channels."""
        return self.pca is not None or self.pca_from is not None

"""Every option, once: frozen dataclasses, checked on construction, read from YAML and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from featup.upsamplers import TrainableName, UpsamplerName
from pipeline.config.base import InputConfig, LabelKind, Size, option

__all__ = ["PrecomputeConfig"]


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(InputConfig):
    """Options of ``jobs.precompute``: shards of images in, a store of features out."""

    _places: ClassVar[tuple[str, ...]] = (*InputConfig._places, "checkpoint", "pca_from")

    labels: tuple[LabelKind, ...] = option((), "labels to store beside the features: seg, depth, cls")
    seg_dtype: Literal["uint8", "uint16"] = option("uint8", "type of the stored class ids; its largest value is 'none'")
    label_orientation: Literal["displayed", "stored"] = option(
        "displayed", "the pixel grid labels are in when EXIF turns the image and sizes cannot tell"
    )
    depth_png_scale: float = option(0.001, "metres per unit of depth.png")
    depth_npy_scale: float = option(1.0, "metres per unit of depth.npy")

    upsampler: UpsamplerName | Literal["implicit"] = option(
        "bilateral",
        "nearest, bilinear, bicubic, bilateral (training-free), trained: jbu, resize_conv, carafe, sapa, ifa, or "
        "implicit: fitted to every image, seconds each",
    )
    checkpoint: str | None = option(
        None, "for those that are trained: our .safetensors, or for jbu an official FeatUp .ckpt", run=True
    )
    output_size: Size | None = option(None, "size of the stored features, HEIGHTxWIDTH; by default that of the image")
    sigma_space: float = option(1.0, "bilateral: in pixels of a stage")
    sigma_colour: float = option(0.2, "bilateral: on RGB in [-1, 1]")

    fit_base: Literal["bilinear", "bilateral", "jbu"] = option(
        "bilateral", "implicit: what a fit starts from and adds to: bilinear, bilateral, or jbu with its checkpoint"
    )
    fit_steps: int = option(20, "implicit: steps of a fit")
    fit_views: int = option(32, "implicit: jittered views of an image that its fit is made from")
    fit_seed: int = option(0, "implicit: of views, samples and first weights")

    pca: int | None = option(None, "store so many principal components instead of all channels")
    pca_images: int = option(256, "images the PCA is fitted on, spread over the data set")
    pca_from: str | None = option(
        None, "another store whose PCA to take, so that one probe serves both; instead of pca", run=True
    )
    mantissa_bits: int | None = option(None, "round stored values to so many of float16's 10 bits, to compress better")
    tile: int | None = option(None, "side of a chunk in pixels; by default as large as keeps a chunk below 4 MiB")
    rows_per_shard: int | None = option(None, "images in one Zarr shard; by default as many as keep it below 256 MiB")
    compression_level: int = option(1, "of zstd, 1 to 9")

    actors: int = option(1, "processes that featurize", run=True)
    gpus_per_actor: float | None = option(None, "by default 1 where the cluster has GPUs, else 0", run=True)
    cpus_per_actor: float = option(1.0, "CPU cores Ray sets aside for each of them", run=True)
    loader_cpus: float = option(0.5, "CPU cores Ray sets aside for each reading and decoding task", run=True)
    batch_size: int = option(8, "images in one forward pass", run=True)
    unit_attempts: int = option(2, "how often a unit is tried before it counts as failed", run=True)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        target = self.target_size
        return [
            *super()._checks(),
            (
                min(*self.size, *target) < 1,
                f"size={self.size}, output_size={target}: both sides must be at least 1",
            ),
            (len(set(self.labels)) != len(self.labels), f"labels={self.labels}: one is named twice"),
            (
                (self._feed_forward in get_args(TrainableName)) != (self.checkpoint is not None),
                f"upsampler={self.upsampler!r} with checkpoint={self.checkpoint!r}: those that are trained "
                f"({', '.join(get_args(TrainableName))}; implicit with fit_base=jbu) need a checkpoint, the others "
                "take none",
            ),
            (
                self.upsampler == "implicit" and not self.projects,
                "upsampler='implicit' fits in the space of a PCA; give --pca, 128 for instance, or --pca-from STORE",
            ),
            (
                self.pca is not None and self.pca_from is not None,
                f"pca={self.pca} fits a PCA and pca_from={self.pca_from!r} takes one that is there; give one of them",
            ),
            (
                min(self.fit_steps, self.fit_views) < 1 or self.fit_seed < 0,
                f"fit_steps={self.fit_steps} and fit_views={self.fit_views} must be at least 1, "
                f"fit_seed={self.fit_seed} at least 0",
            ),
            (
                self.sigma_space <= 0 or self.sigma_colour <= 0,
                "sigma_space and sigma_colour must be positive",
            ),
            (self.pca is not None and self.pca < 1, f"pca={self.pca} must be at least 1"),
            (self.pca_images < 1, f"pca_images={self.pca_images} must be at least 1"),
            (
                self.mantissa_bits is not None and not 1 <= self.mantissa_bits <= 10,
                f"mantissa_bits={self.mantissa_bits} must be between 1 and 10",
            ),
            (self.tile is not None and self.tile < 1, f"tile={self.tile} must be at least 1"),
            (
                self.rows_per_shard is not None and self.rows_per_shard < 1,
                f"rows_per_shard={self.rows_per_shard} must be at least 1",
            ),
            (
                not 1 <= self.compression_level <= 9,
                f"compression_level={self.compression_level} must be 1 to 9",
            ),
            (self.actors < 1, f"actors={self.actors} must be at least 1"),
            (self.batch_size < 1, f"batch_size={self.batch_size} must be at least 1"),
            (self.unit_attempts < 1, f"unit_attempts={self.unit_attempts} must be at least 1"),
            (
                self.cpus_per_actor == self.loader_cpus and not self.gpus_per_actor,
                f"cpus_per_actor and loader_cpus are both {self.loader_cpus}: Ray would then run reading and decoding "
                "inside the actors, one after the other; make them differ",
            ),
        ]

    @property
    def _feed_forward(self) -> str:
        return self.fit_base if self.upsampler == "implicit" else self.upsampler

    @property
    def target_size(self) -> Size:
        """(height, width) of the stored features."""
        return self.output_size or self.size

    @property
    def projects(self) -> bool:
        """Whether principal components are stored in place of the channels."""
        return self.pca is not None or self.pca_from is not None

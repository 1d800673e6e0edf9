"""Every option, once: frozen dataclasses, checked on construction, read from YAML and the command line."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, Self, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
from jsonargparse.typing import register_type

from featup.upsamplers import RangeKernel, TrainableName, UpsamplerName
from pipeline import storage
from pipeline.decode import IMAGE_EXTS
from pipeline.errors import ConfigError
from pipeline.geometry import Geometry

__all__ = [
    "BackboneConfig",
    "EvaluateConfig",
    "InputConfig",
    "LabelKind",
    "PrecomputeConfig",
    "ProbeConfig",
    "Size",
    "TrainConfig",
    "describe",
    "parse_args",
    "read_config",
]

LabelKind = Literal["seg", "depth", "cls"]
Precision = Literal["float32", "bfloat16", "float16"]


class Size(NamedTuple):
    """(height, width) in pixels, written ``352x480``, or ``224`` for a square."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @staticmethod
    def parse(text: object) -> "Size":
        """From ``"352x480"``, ``"224"``, 224 or a pair of numbers.

        Raises:
            ValueError: anything else.
        """
        if isinstance(text, (list, tuple)) and len(text) == 2:
            text = f"{text[0]}x{text[1]}"
        found = re.fullmatch(r"\s*(\d+)(?:\s*[xX]\s*(\d+))?\s*", str(text))
        if found is None:
            raise ValueError(f"a size is HEIGHTxWIDTH, such as 352x480, or one number for a square, not {text!r}")
        return Size(int(found[1]), int(found[2] or found[1]))


register_type(Size, serializer=str, deserializer=Size.parse, fail_already_registered=False)


def _option(default: Any, text: str, *, run: bool = False) -> Any:
    """A field with its help; ``run`` marks options that change how the job runs and not what it writes."""
    metadata = {"help": text, "run": run}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Options that are checked on construction."""

    def __post_init__(self) -> None:
        problems = [text for broken, text in self._checks() if broken]
        if problems:
            raise ConfigError("; ".join(problems))

    def _checks(self) -> Sequence[tuple[bool, str]]:
        """What may be wrong: whether it is, and the text that says so."""
        return []


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(_Checked):
    """What every job that runs a backbone has: where its results go, the image and the backbone."""

    out: str = _option(
        MISSING, "what the job makes: a folder or an fsspec URL that every worker can write to", run=True
    )

    image_exts: tuple[str, ...] = _option(IMAGE_EXTS, "extensions an image may have, the first present wins")
    size: Size = _option(Size(224, 224), "size of the image given to the backbone, HEIGHTxWIDTH")
    geometry: Geometry = _option(
        "squash",
        "how an image gets that size: squash, center_crop, or pad (keeps the aspect, with a valid mask)",
    )
    max_pixels: int = _option(100_000_000, "images with more pixels than this are not decoded")

    backbone: str = _option("vit_small_patch14_dinov2.lvd142m", "name of a timm model")
    weights: str | None = _option(None, "local .safetensors or .pth file with the backbone's weights", run=True)
    pretrained: bool = _option(True, "without a file: download timm's weights (false: random ones, for speed only)")
    layer: int = _option(-1, "which of the model's feature maps: ViT block or CNN stage, -1 for the last")
    stride: int | None = _option(None, "instead of layer: the deepest map of this stride in pixels")
    norm: Literal["none", "model", "layer"] = _option(
        "model",
        "of the features: none, the model's own final one where it has one, or layer (parameter-free)",
    )
    backbone_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "more arguments for timm.create_model", "run": False}
    )
    mean: tuple[float, float, float] | None = _option(None, "image mean, RGB in [0, 1]; by default the model's own")
    std: tuple[float, float, float] | None = _option(None, "image standard deviation; by default the model's own")
    precision: Precision = _option("float32", "of the backbone; float16 and bfloat16 are for GPUs")

    threads: int | None = _option(
        None, "threads of each actor or worker; by default the machine's cores shared among them", run=True
    )
    max_failed_fraction: float = _option(0.01, "more failed samples than this fraction fail the job", run=True)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            (not self.out, "out is empty; give the folder or URL of the store, or of what is trained"),
            (
                self.stride is not None and self.layer != -1,
                f"stride={self.stride} and layer={self.layer} both choose the feature map; give one of them",
            ),
            (
                any(values is not None and len(values) != 3 for values in (self.mean, self.std)),
                f"mean={self.mean}, std={self.std}: three numbers each, for red, green and blue",
            ),
            (
                not 0 <= self.max_failed_fraction <= 1,
                f"max_failed_fraction={self.max_failed_fraction} must be between 0 and 1",
            ),
            (self.threads is not None and self.threads < 1, f"threads={self.threads} must be at least 1"),
        ]


@dataclass(frozen=True, kw_only=True)
class InputConfig(BackboneConfig):
    """What every job on Ray that runs a backbone over shards has."""

    # Options that name a place, and must mean the same in every process.
    _places: ClassVar[tuple[str, ...]] = ("shards", "out", "weights")

    shards: tuple[str, ...] = _option(
        MISSING,
        "tar shards in WebDataset format: paths or fsspec URLs, with {0000..0099} braces and * globs",
        run=True,
    )
    limit: int | None = _option(None, "use only the first so many samples")
    object_store_mb: int = _option(512, "memory of Ray's object store when the job starts its own Ray", run=True)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            (not self.shards, "shards is empty; give at least one tar"),
            *super()._checks(),
            (self.limit is not None and self.limit < 1, f"limit={self.limit} must be at least 1"),
        ]

    def absolute(self, on_cluster: bool) -> Self:
        """The same config with local paths made absolute, as workers may have another working folder.

        Raises:
            ConfigError: ``on_cluster`` and a path is relative: it would lead into the job's own short-lived copy of
                the project.
        """
        relative: list[str] = []

        def whole(name: str) -> str:
            if not storage.is_local(name) or os.path.isabs(storage.local_path(name)):
                return name
            relative.append(name)
            return os.path.abspath(storage.local_path(name))

        changed: dict[str, Any] = {}
        for option in self._places:
            value = getattr(self, option)
            changed[option] = tuple(map(whole, value)) if isinstance(value, tuple) else whole(value) if value else None
        if on_cluster and relative:
            raise ConfigError(
                f"relative paths on a cluster: {relative[:5]}; a job runs in a copy of the working folder that is "
                "removed afterwards, so give absolute paths or URLs that every node sees"
            )
        return replace(self, **changed)

    def identity(self) -> dict[str, Any]:
        """The options that decide what is made: work is resumed only where these are the same."""
        values = describe(self)
        return {one.name: values[one.name] for one in fields(self) if not one.metadata["run"]}


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(InputConfig):
    """Options of ``jobs.precompute``: shards of images in, a store of features out."""

    _places: ClassVar[tuple[str, ...]] = (*InputConfig._places, "checkpoint", "pca_from")

    labels: tuple[LabelKind, ...] = _option((), "labels to store beside the features: seg, depth, cls")
    seg_dtype: Literal["uint8", "uint16"] = _option(
        "uint8", "type of the stored class ids; its largest value is 'none'"
    )
    label_orientation: Literal["displayed", "stored"] = _option(
        "displayed", "the pixel grid labels are in when EXIF turns the image and sizes cannot tell"
    )
    depth_png_scale: float = _option(0.001, "metres per unit of depth.png")
    depth_npy_scale: float = _option(1.0, "metres per unit of depth.npy")

    upsampler: UpsamplerName | Literal["implicit"] = _option(
        "bilateral",
        "nearest, bilinear, bicubic, bilateral (training-free), trained: jbu, resize_conv, carafe, sapa, ifa, or "
        "implicit: fitted to every image, seconds each",
    )
    checkpoint: str | None = _option(
        None, "for those that are trained: our .safetensors, or for jbu an official FeatUp .ckpt", run=True
    )
    output_size: Size | None = _option(None, "size of the stored features, HEIGHTxWIDTH; by default that of the image")
    sigma_space: float = _option(1.0, "bilateral: in pixels of a stage")
    sigma_colour: float = _option(0.2, "bilateral: on RGB in [-1, 1]")

    fit_base: Literal["bilinear", "bilateral", "jbu"] = _option(
        "bilateral", "implicit: what a fit starts from and adds to: bilinear, bilateral, or jbu with its checkpoint"
    )
    fit_steps: int = _option(20, "implicit: steps of a fit")
    fit_views: int = _option(32, "implicit: jittered views of an image that its fit is made from")
    fit_seed: int = _option(0, "implicit: of views, samples and first weights")

    pca: int | None = _option(None, "store so many principal components instead of all channels")
    pca_images: int = _option(256, "images the PCA is fitted on, spread over the data set")
    pca_from: str | None = _option(
        None, "another store whose PCA to take, so that one probe serves both; instead of pca", run=True
    )
    mantissa_bits: int | None = _option(None, "round stored values to so many of float16's 10 bits, to compress better")
    tile: int | None = _option(None, "side of a chunk in pixels; by default as large as keeps a chunk below 4 MiB")
    rows_per_shard: int | None = _option(None, "images in one Zarr shard; by default as many as keep it below 256 MiB")
    compression_level: int = _option(1, "of zstd, 1 to 9")

    actors: int = _option(1, "processes that featurize", run=True)
    gpus_per_actor: float | None = _option(None, "by default 1 where the cluster has GPUs, else 0", run=True)
    cpus_per_actor: float = _option(1.0, "CPU cores Ray sets aside for each of them", run=True)
    loader_cpus: float = _option(0.5, "CPU cores Ray sets aside for each reading and decoding task", run=True)
    batch_size: int = _option(8, "images in one forward pass", run=True)
    unit_attempts: int = _option(2, "how often a unit is tried before it counts as failed", run=True)

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


@dataclass(frozen=True, kw_only=True)
class TrainConfig(InputConfig):
    """Options of ``jobs.train_jbu``: shards of images in, a trained upsampler out."""

    upsampler: TrainableName = _option("jbu", "what is trained: jbu, resize_conv, carafe, sapa or ifa")
    kernel: RangeKernel = _option(
        "distance", "jbu: the range kernel, distance (starts as a bilateral filter) or projection (the paper's)"
    )
    start_space: float = _option(3.0, "distance kernel: sigma it starts with, in pixels of a stage; 1 for small things")
    start_colour: float = _option(0.1, "distance kernel: sigma it starts with, on RGB in [-1, 1]")
    feature_keys: int = _option(
        8, "distance kernel: directions of the coarse features that it compares beside colours, 0 for colours alone"
    )
    coarse_stages: int = _option(
        2, "distance kernel: stages at the features' own size before the doublings; 0 for small things"
    )
    bicubic_a: float = _option(
        -2.0, "distance kernel: of the bicubic interpolation in a stage; -0.75 is the usual one, less sharpens more"
    )
    downsampler: Literal["attention", "blur"] = _option(
        "attention", "the model of the backbone's patch that is trained with it: attention or blur"
    )
    jitters: int = _option(2, "jittered views of an image that its features must explain, new ones in every step")
    max_pad: int = _option(20, "jitter: pixels of reflected border, and so the largest shift")
    max_zoom: float = _option(1.0, "jitter: the largest zoom, 1 for none")
    projections: int | None = _option(30, "random channels that are compared in a step; null for all channels")
    crf: float = _option(0.001, "weight of the sampled CRF, 0 for none")
    total_variation: float = _option(0.0, "weight of the total variation, 0 for none")
    magnitude: float = _option(0.0, "weight of the vectors' lengths, 0 for none")

    steps: int = _option(
        200, "updates of the weights; ten times as many for what starts from random ones: all but the distance kernel"
    )
    batch_size: int = _option(2, "images in one step, over all workers")
    optimiser: Literal["nadam", "adamw"] = _option("nadam", "nadam or adamw")
    lr: float = _option(3e-5, "learning rate; thirty times as much for what starts from random weights")
    schedule: Literal["constant", "cosine"] = _option("constant", "of the learning rate: constant, or cosine down to 0")
    seed: int = _option(0, "of the first weights, the order of the samples, views, projections and dropout")
    holdout: int = _option(32, "samples, spread over the data set, that are evaluated on and never trained on")
    evaluate_every: int = _option(200, "steps from one evaluation to the next; the best one is kept")

    workers: int = _option(1, "processes that train, each with its share of the batch", run=True)
    gpus_per_worker: float | None = _option(None, "by default 1 where the cluster has GPUs, else 0", run=True)
    cpus_per_worker: float = _option(1.0, "CPU cores Ray sets aside for each of them", run=True)
    worker_attempts: int = _option(3, "how often the workers are started before the job fails", run=True)
    checkpoint_every: int = _option(100, "steps from one checkpoint to the next; a run goes on from the last", run=True)
    tensorboard: bool = _option(False, "also write TensorBoard event files, into OUT/tensorboard", run=True)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        counts = ["steps", "jitters", "batch_size", "holdout", "evaluate_every"]
        counts += ["workers", "worker_attempts", "checkpoint_every"]
        return [
            *super()._checks(),
            (min(self.size) < 1, f"size={self.size}: both sides must be at least 1"),
            *((getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 1") for name in counts),
            (
                self.projections is not None and self.projections < 1,
                f"projections={self.projections} must be at least 1, or null for all channels",
            ),
            (self.max_pad < 0, f"max_pad={self.max_pad} must be 0 pixels or more"),
            (not self.max_zoom >= 1, f"max_zoom={self.max_zoom} must be at least 1"),
            (not self.lr > 0, f"lr={self.lr} must be positive"),
            (
                not min(self.start_space, self.start_colour) > 0,
                f"start_space={self.start_space} and start_colour={self.start_colour} must be positive",
            ),
            (
                min(self.feature_keys, self.coarse_stages) < 0,
                f"feature_keys={self.feature_keys} and coarse_stages={self.coarse_stages} must be 0 or more",
            ),
            (self.seed < 0, f"seed={self.seed} must be 0 or more"),
            (
                not min(self.crf, self.total_variation, self.magnitude) >= 0,
                f"crf={self.crf}, total_variation={self.total_variation}, magnitude={self.magnitude}: weights cannot "
                "be negative",
            ),
            (
                self.batch_size % max(1, self.workers) != 0,
                f"batch_size={self.batch_size} is that of all {self.workers} workers and must divide among them, or "
                "some images would count for more than others",
            ),
            (
                self.tensorboard and not storage.is_local(self.out),
                f"tensorboard with out={self.out!r}: event files are written to local folders only; leave it away, "
                "log.jsonl holds the same numbers",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BackboneConfig):
    """Options of ``jobs.evaluate``: shards of labelled images in, a table of upsamplers out."""

    train: tuple[str, ...] = _option((), "segmentation: tar shards with seg.png to fit probes on")
    val: tuple[str, ...] = _option((), "segmentation: tar shards with seg.png to evaluate on")
    classes: int | None = _option(None, "segmentation: how many classes there are")
    ignore_index: int = _option(255, "segmentation: the class id of pixels without a label")
    depth_train: tuple[str, ...] = _option((), "depth: tar shards with depth.png or depth.npy to fit probes on")
    depth_val: tuple[str, ...] = _option((), "depth: tar shards with depth.png or depth.npy to evaluate on")
    depth_png_scale: float = _option(0.001, "metres per unit of depth.png")
    depth_npy_scale: float = _option(1.0, "metres per unit of depth.npy")
    cam_shards: tuple[str, ...] = _option((), "class activation maps: tar shards with images, labels are not read")
    limit: int | None = _option(None, "evaluate on the first so many images of each set")
    train_limit: int | None = _option(None, "fit on the first so many images of each set")

    rows: tuple[str, ...] = _option(
        ("nearest", "bilinear", "bicubic", "strided", "large_image", "bilateral"),
        "of the table: nearest, bilinear, bicubic, bilateral, strided, large_image; NAME=FILE for those that are "
        "trained: jbu, resize_conv, carafe, sapa, ifa; and those that are fitted to each image: deep_image_prior, "
        "implicit, which starts from bilateral, or implicit=FILE from a jbu",
    )
    fit_steps: int = _option(20, "implicit: steps of a fit")
    fit_views: int = _option(32, "implicit: jittered views of an image that its fit is made from")
    fit_components: int = _option(128, "implicit: principal components of the training images' features to fit in")
    prior_steps: int = _option(300, "deep_image_prior: steps of a fit")
    views: int = _option(
        0, "also measure the share of variance that each row explains of so many shifted views of an image, 0 for none"
    )
    views_images: int = _option(16, "images the views are made of, spread over the set")
    factor: int = _option(2, "strided and large_image: how many times finer their features are")
    sigma_space: float = _option(1.0, "bilateral: in pixels of a stage")
    sigma_colour: float = _option(0.2, "bilateral: on RGB in [-1, 1]")
    retrained: bool = _option(True, "also fit probes on each row's own upsampled features")
    pixels: int = _option(100, "retrained: pixels of every training image that the probe is fitted on")
    seeds: int = _option(1, "retrained: how many probes, each on other pixels")
    max_vectors: int = _option(200_000, "fit a probe on no more feature vectors than this, drawn by a seed")
    resamples: int = _option(200, "of the images, for the intervals of differences")
    pictures: int = _option(6, "images of each set to make pictures of")
    batch_size: int = _option(8, "images upsampled at once", run=True)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        counts = (
            *("limit", "train_limit", "classes", "factor", "pixels", "seeds", "max_vectors", "resamples"),
            *("fit_steps", "fit_views", "fit_components", "prior_steps", "views_images"),
        )
        return [
            *super()._checks(),
            (min(self.size) < 1, f"size={self.size}: both sides must be at least 1"),
            (
                bool(self.train) != bool(self.val) or bool(self.depth_train) != bool(self.depth_val),
                f"train={self.train} with val={self.val}, depth_train={self.depth_train} with "
                f"depth_val={self.depth_val}: a probe is fitted on one and evaluated on the other, give both",
            ),
            (
                not (self.train or self.depth_train or self.cam_shards),
                "nothing to evaluate on; give train and val, depth_train and depth_val, or cam_shards",
            ),
            (
                bool(self.train) != (self.classes is not None),
                f"train={self.train} with classes={self.classes}: segmentation needs both",
            ),
            (not self.rows, "rows is empty; name at least one upsampler"),
            (len(set(self.rows)) != len(self.rows), f"rows={self.rows}: one is named twice"),
            *(
                (
                    getattr(self, name) is not None and getattr(self, name) < 1,
                    f"{name}={getattr(self, name)} must be at least 1",
                )
                for name in (*counts, "batch_size")
            ),
            (
                min(self.pictures, self.views) < 0,
                f"pictures={self.pictures} and views={self.views} must be 0 or more",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(_Checked):
    """Options of ``jobs.train_probe``: a store of features and labels in, a linear probe out."""

    store: str = _option(MISSING, "the feature store to fit on: what was --out of jobs.precompute")
    val_store: str | None = _option(None, "another store, to evaluate on")
    out: str = _option(MISSING, "the probe: a .safetensors file")
    label: Literal["seg", "depth"] = _option("seg", "which of the store's labels: seg or depth")
    classes: int | None = _option(None, "seg: how many classes there are")
    ignore_index: int = _option(255, "seg: the class id of pixels without a label")
    pixels: int = _option(200, "pixels of every image that the probe is fitted on, fewer where there are many images")
    max_vectors: int = _option(400_000, "pixels in all that the probe is fitted on, at most")
    seed: int = _option(0, "of the pixels that are drawn")
    workers: int = _option(2, "processes that read the store", run=True)
    batch_size: int = _option(8, "images read at once by each of them", run=True)
    threads: int | None = _option(None, "threads of the fit; by default the machine's cores", run=True)

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


def describe(config: Any) -> dict[str, Any]:
    """A config as plain values that JSON and YAML hold and :func:`parse_args` reads back."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Size) else list(value) if isinstance(value, tuple) else value

    return {one.name: plain(getattr(config, one.name)) for one in fields(config)}


Config = TypeVar("Config")


def read_config(config: type[Config], values: Mapping[str, Any]) -> Config:
    """What :func:`describe` made."""
    hints = get_type_hints(config)

    def typed(name: str, value: Any) -> Any:
        if value is not None and Size in (hints[name], *get_args(hints[name])):
            return Size.parse(value)
        return tuple(value) if isinstance(value, list) else value

    return config(**{name: typed(name, value) for name, value in values.items()})


class _Parser(jsonargparse.ArgumentParser):
    """Names the nearest option when one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [action.dest for action in self._actions]
        hints = []
        for name in re.findall(r"--([\w-]+)|(?:[Kk]ey|[Oo]ption) ['\"]([\w.-]+)['\"]", message):
            unknown = name[0].replace("-", "_") or name[1]
            if unknown not in known:
                near = get_close_matches(unknown, known, 1, 0.5)
                hints.append(f"unknown option {unknown!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        super().error("; ".join([*hints, message.strip()]) if hints else message, ex)

    def _check_value_key(self, action: argparse.Action, value: Any, *args: Any, **kwargs: Any) -> Any:
        # A YAML file may name one word where several are possible; its letters would be taken for the words.
        if action.nargs == "*" and isinstance(value, str):
            value = [value]
        return super()._check_value_key(action, value, *args, **kwargs)


def _several_words(hint: Any) -> dict[str, Any]:
    """Arguments for an option that takes several words, where its type is a tuple (or none)."""
    for one in (hint, *get_args(hint)):
        if get_origin(one) is tuple:
            of, *rest = get_args(one)
            return {"type": of, "nargs": "*" if rest == [Ellipsis] else 1 + len(rest)}
    return {}


def parse_args(
    config: type[Config],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extra: Callable[[jsonargparse.ArgumentParser], None] | None = None,
) -> tuple[Config, Any]:
    """Read a config from ``--config FILE.yaml`` and ``--option value``, the later of two winning.

    ``-`` and ``_`` are the same in an option's name on the command line. Unknown options, also those in the file, end
    the program with the nearest known name.

    Args:
        config: The dataclass.
        extra: Adds arguments that are not part of the config.

    Returns:
        The config, and the namespace with all values.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    if extra is not None:
        extra(parser)
    hints = get_type_hints(config)
    for one in fields(config):  # type: ignore[arg-type]
        kwargs: dict[str, Any] = {"help": one.metadata["help"], "type": hints[one.name]}
        if one.default is not MISSING:
            kwargs["default"] = one.default
        elif one.default_factory is not MISSING:
            kwargs["default"] = one.default_factory()
        else:
            kwargs["required"] = True
        kwargs |= _several_words(hints[one.name])
        if isinstance(kwargs.get("default"), tuple) and not isinstance(kwargs["default"], Size):
            kwargs["default"] = list(kwargs["default"])
        parser.add_argument(f"--{one.name}", **kwargs)
    words = list(sys.argv[1:] if argv is None else argv)
    words = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]
    namespace = parser.parse_args(words)
    values = {one.name: namespace[one.name] for one in fields(config)}  # type: ignore[arg-type]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return config(**values), namespace
    except ConfigError as error:
        parser.error(str(error))

"""Options that several jobs share, and how options are written and read back."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, Self, TypeVar, get_args, get_type_hints

from featup.aliases import resolve_backbone
from pipeline.decode.kinds import LABELS
from pipeline.decode.options import ImageOptions
from pipeline.errors import ConfigError, StoreFormatError
from pipeline.inputs import storage
from pipeline.options import Size, option
from pipeline.redaction import redact

__all__ = ["RETIRED", "BackboneConfig", "Config", "InputConfig", "describe", "options_since", "read_config"]


Precision = Literal["float32", "bfloat16", "float16"]
LARGEST_SEED = 2**32 - 1
RETIRED = frozenset({"fit_base"})
"""Options of older programs that are no more: they are not read."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(ImageOptions):
    """Options of every job that runs a backbone: the output, decoding, and the backbone."""

    out: str = option(
        MISSING,
        "output of the job: a folder or an fsspec URL that every worker can write to",
        group="input",
        run=True,
        path=True,
    )

    size: Size = option(
        Size(224, 224),
        "size of the image given to the backbone in pixels, HEIGHTxWIDTH",
        group="backbone",
        at_least=1,
        at_most=16384,
    )
    backbone: str = option(
        "vit_small_patch14_dinov2.lvd142m",
        "name of a timm model, or another name of it, such as dinov2_vits14, ViT-B/16 or facebook/dinov2-small",
        group="backbone",
    )
    weights: str | None = option(
        None,
        "local .safetensors, .pth or .npz file with the backbone's weights: timm's names or the authors' own",
        group="backbone",
        run=True,
        path=True,
    )
    pretrained: bool = option(
        True, "without a file: download timm's weights (false: random weights, for speed only)", group="backbone"
    )
    layer: int = option(
        -1, "which of the model's feature maps: ViT block or CNN stage, -1 for the last", group="backbone"
    )
    stride: int | None = option(
        None, "instead of layer: the deepest map of this stride, in pixels", group="backbone", at_least=1
    )
    norm: Literal["none", "model", "layer"] = option(
        "model",
        "normalisation of the features: none, the model's own final one where it has one, or layer (parameter-free)",
        group="backbone",
    )
    backbone_kwargs: dict[str, Any] = option(dict, "more arguments for timm.create_model, as JSON", group="backbone")
    mean: tuple[float, float, float] | None = option(
        None, "image mean for red, green, blue; by default the model's own", group="backbone", at_least=0, at_most=1
    )
    std: tuple[float, float, float] | None = option(
        None,
        "image standard deviation for red, green, blue; by default the model's own",
        group="backbone",
        above=0,
        at_most=10,
    )
    precision: Precision = option("float32", "of the backbone; float16 and bfloat16 are for GPUs", group="backbone")

    threads: int | None = option(
        None,
        "threads of each actor or worker; by default the machine's cores shared among them",
        group="run",
        run=True,
        at_least=1,
    )
    max_failed_fraction: float = option(
        0.01, "a larger fraction of failed samples fails the job", group="run", run=True, at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        # Before anything is compared or stored: every spelling of a backbone makes the same store.
        if isinstance(self.backbone, str):
            object.__setattr__(self, "backbone", resolve_backbone(self.backbone))
        super().__post_init__()

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
            (not self.backbone, "backbone is empty; name a timm model"),
            (
                self.stride is not None and self.layer != -1,
                f"stride={self.stride} and layer={self.layer} both choose the feature map; give one of them",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class InputConfig(BackboneConfig):
    """Options of every job on Ray that runs a backbone over shards."""

    shards: tuple[str, ...] = option(
        (),
        "tar shards in WebDataset format: paths or fsspec URLs, with {0000..0099} braces and * globs",
        group="input",
        run=True,
        path=True,
    )
    images: tuple[str, ...] = option(
        (),
        "instead of shards: folders (searched with all below them), lists (.txt, .csv, .tsv, .parquet) or files of "
        "images, videos, parquet files of images, or saved Hugging Face data sets; paths or fsspec URLs",
        group="input",
        run=True,
        path=True,
    )
    every: int = option(
        1, "of a video the first frame, and then every so many-th, is an image", group="input", run=True, at_least=1
    )
    image_column: str | None = option(
        None,
        "the column of images in lists, parquet files and data sets; by default image, or the only one",
        group="input",
        run=True,
    )
    limit: int | None = option(
        None, "use only so many samples, spread evenly over the input", group="input", at_least=1
    )
    object_store_mb: int = option(
        512, "MiB of Ray's object store, where the job starts its own Ray", group="run", run=True, at_least=75
    )
    resource_timeout: float = option(
        1800.0,
        "seconds to wait on a cluster for CPUs and GPUs that are asked for and not there yet",
        group="run",
        run=True,
        at_least=0,
    )

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
            (
                bool(self.shards) == bool(self.images),
                f"shards={self.shards} and images={self.images}: give tars by --shards, or a folder or list by "
                "--images, and not both",
            ),
            images_only(self.images, self.every, self.image_column),
        ]

    def absolute(self, on_cluster: bool) -> Self:
        """The same config with local paths made absolute, as workers may have another working folder.

        Raises:
            ConfigError: ``on_cluster`` and a path is relative: it would lead into the job's own short-lived copy of
                the project.
        """
        relative: list[str] = []

        def whole(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(whole, value))
            kind, equals, place = str(value).partition("=")
            if equals and kind in LABELS:  # KIND=FOLDER
                return f"{kind}={whole(place)}"
            if value is None or not storage.is_local(value) or os.path.isabs(storage.local_path(value)):
                return value
            relative.append(value)
            return os.path.abspath(storage.local_path(value))

        changed = {one.name: whole(getattr(self, one.name)) for one in fields(self) if one.metadata["path"]}
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


def images_only(images: tuple[str, ...], every: int, image_column: str | None) -> tuple[bool, str]:
    """Tars have neither frames nor columns."""
    return not images and (every != 1 or image_column is not None), (
        f"every={every} and image_column={image_column!r} go with --images: in tars every image is a file"
    )


def whole_gpus(name: str, gpus: float | None) -> tuple[bool, str]:
    """Ray gives a process a share of one GPU, or whole GPUs."""
    return gpus is not None and gpus > 1 and gpus != int(
        gpus
    ), f"{name}={gpus}: more than one GPU must be a whole number"


def describe(config: Any) -> dict[str, Any]:
    """A config as plain values that JSON and YAML hold and :func:`read_config` reads back, without credentials."""

    def plain(value: Any) -> Any:
        if isinstance(value, Size):
            return str(value)
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        return redact(value) if isinstance(value, str) else value

    return {one.name: plain(getattr(config, one.name)) for one in fields(config)}


Config = TypeVar("Config")


def options_since(config: Any) -> dict[str, Any]:
    """Options that change by default what was done before they were there, with what that was."""
    return {one.name: one.metadata["before"] for one in fields(config) if one.metadata["before"] is not MISSING}


def read_config(config: type[Config], values: Mapping[str, Any]) -> Config:
    """A config from the plain values of :func:`describe`.

    Options that are not among them have their defaults, or what was done before there were these options.

    Raises:
        StoreFormatError: options that this program does not know, or without one that has no default.
        ConfigError: values that cannot be.
    """
    known = {one.name: one for one in fields(config)}  # type: ignore[arg-type]
    values = {name: value for name, value in values.items() if name not in RETIRED}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise StoreFormatError(f"made by a newer program: options {unknown} are not known here; update this one")
    needed = [
        name
        for name, one in known.items()
        if name not in values and one.default is MISSING and one.default_factory is MISSING
    ]
    if needed:
        raise StoreFormatError(f"the stored options lack {needed}; the file is damaged, or of another program")
    hints = get_type_hints(config)

    def typed(name: str, value: Any) -> Any:
        if value is not None and Size in (hints[name], *get_args(hints[name])):
            return Size.parse(value)
        return tuple(value) if isinstance(value, list) else value

    return config(**options_since(config) | {name: typed(name, value) for name, value in values.items()})

"""Options that several jobs share, and how options are checked, written and read back."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args, get_type_hints

from jsonargparse.typing import register_type

from pipeline.decode.geometry import Geometry
from pipeline.decode.kinds import IMAGE_EXTS
from pipeline.errors import ConfigError
from pipeline.inputs import storage

__all__ = ["BackboneConfig", "InputConfig", "LabelKind", "Size", "describe", "read_config"]


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


def option(default: Any, text: str, *, run: bool = False) -> Any:
    """A field with its help; ``run`` marks options that change how the job runs and not what it writes."""
    metadata = {"help": text, "run": run}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Options that are checked on construction."""

    def __post_init__(self) -> None:
        problems = [text for broken, text in self._checks() if broken]
        if problems:
            raise ConfigError("; ".join(problems))

    def _checks(self) -> Sequence[tuple[bool, str]]:
        """What may be wrong: whether it is, and the text that says so."""
        return []


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Checked):
    """What every job that runs a backbone has: where its results go, the image and the backbone."""

    out: str = option(MISSING, "what the job makes: a folder or an fsspec URL that every worker can write to", run=True)

    image_exts: tuple[str, ...] = option(IMAGE_EXTS, "extensions an image may have, the first present wins")
    size: Size = option(Size(224, 224), "size of the image given to the backbone, HEIGHTxWIDTH")
    geometry: Geometry = option(
        "squash",
        "how an image gets that size: squash, center_crop, or pad (keeps the aspect, with a valid mask)",
    )
    max_pixels: int = option(100_000_000, "images with more pixels than this are not decoded")
    max_bytes: int = option(256 << 20, "a sample with a member of more bytes than this fails")
    decode_timeout: float = option(60.0, "a sample whose decoding takes longer than this, in seconds, fails")

    backbone: str = option("vit_small_patch14_dinov2.lvd142m", "name of a timm model")
    weights: str | None = option(None, "local .safetensors or .pth file with the backbone's weights", run=True)
    pretrained: bool = option(True, "without a file: download timm's weights (false: random ones, for speed only)")
    layer: int = option(-1, "which of the model's feature maps: ViT block or CNN stage, -1 for the last")
    stride: int | None = option(None, "instead of layer: the deepest map of this stride in pixels")
    norm: Literal["none", "model", "layer"] = option(
        "model",
        "of the features: none, the model's own final one where it has one, or layer (parameter-free)",
    )
    backbone_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "more arguments for timm.create_model", "run": False}
    )
    mean: tuple[float, float, float] | None = option(None, "image mean, RGB in [0, 1]; by default the model's own")
    std: tuple[float, float, float] | None = option(None, "image standard deviation; by default the model's own")
    precision: Precision = option("float32", "of the backbone; float16 and bfloat16 are for GPUs")

    threads: int | None = option(
        None, "threads of each actor or worker; by default the machine's cores shared among them", run=True
    )
    max_failed_fraction: float = option(0.01, "more failed samples than this fraction fail the job", run=True)

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

    shards: tuple[str, ...] = option(
        MISSING,
        "tar shards in WebDataset format: paths or fsspec URLs, with {0000..0099} braces and * globs",
        run=True,
    )
    limit: int | None = option(None, "use only the first so many samples")
    object_store_mb: int = option(512, "memory of Ray's object store when the job starts its own Ray", run=True)

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

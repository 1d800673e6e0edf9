"""The kinds of labels: the files they come from and how they are stored. Imports no decoder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from pipeline.errors import ConfigError

__all__ = ["IMAGE_EXTS", "LABELS", "LABEL_EXTENSIONS", "LabelSpec", "label_spec"]


IMAGE_EXTS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jfif", "avif", "jp2")


@dataclass(frozen=True)
class LabelSpec:
    """One kind of label.

    Attributes:
        kind: its name, which is also the name of its array in the store.
        extensions: accepted WebDataset extensions; the first one present is used.
        dtype: of the stored array.
        per_pixel: True: [h, w], goes through the image's transform; False: one number for the sample.
        fill: the value of padding and of rows that hold no sample.
    """

    kind: str
    extensions: tuple[str, ...]
    dtype: str
    per_pixel: bool
    fill: float


LABELS: Mapping[str, LabelSpec] = MappingProxyType(
    {
        "seg": LabelSpec("seg", ("seg.png",), "uint8", True, 255),
        "depth": LabelSpec("depth", ("depth.png", "depth.npy"), "float32", True, float("nan")),
        "cls": LabelSpec("cls", ("cls", "cls.txt"), "int64", False, -1),
    }
)


LABEL_EXTENSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {kind: spec.extensions for kind, spec in LABELS.items()}
)


def label_spec(kind: str, seg_dtype: Literal["uint8", "uint16"] = "uint8") -> LabelSpec:
    """``LABELS[kind]``, with ``seg`` as uint16 and the fill value 65535 for ``seg_dtype="uint16"``.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in LABELS:
        raise ConfigError(f"unknown label kind {kind!r}; choose from {', '.join(LABELS)}")
    if kind == "seg" and seg_dtype == "uint16":
        return replace(LABELS[kind], dtype="uint16", fill=65535)
    return LABELS[kind]

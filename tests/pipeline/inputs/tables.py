"""Tables of images for tests, and what is listed and read of them."""

from typing import Any

import pyarrow as pa

from pipeline.inputs.images import ImageList, list_images
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import ShardIndex

EXTS = ("jpg", "jpeg", "png")
LABELS = {"seg": ("seg.png",), "depth": ("depth.png", "depth.npy"), "cls": ("cls", "cls.txt")}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def listed(*places: object, **options: Any) -> ImageList:
    return list_images([str(place) for place in places], EXTS, LABELS, {}, **options)


def read(images: ImageList) -> list[Any]:
    return read_samples(ShardIndex("", 0, "", tuple(images.samples), ()), 0, len(images.samples))


def keys(images: ImageList) -> list[str]:
    return [sample.key for sample in images.samples]


def cells(*names: str) -> list[dict[str, Any]]:
    """Images whose bytes are their names, with paths."""
    return [{"bytes": name.encode(), "path": name} for name in names]

"""Options of ``featup evaluate``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

from featup.names import PublishedName, TrainableName, UpsamplerName
from pipeline.config.base import BackboneConfig
from pipeline.config.bilateral import BilateralOptions
from pipeline.config.per_image import PerImageOptions
from pipeline.decode.options import DepthOptions
from pipeline.options import option

__all__ = ["EvaluateConfig", "MultiViewRow", "multiview_row", "row_file"]


_TRAINED = get_args(TrainableName)
_WITH_FILE = (*_TRAINED, *get_args(PublishedName))
_FEED_FORWARD = tuple(name for name in get_args(UpsamplerName) if name not in _TRAINED)
_UNTRAINED = (*_FEED_FORWARD, "strided", "large_image", "deep_image_prior", "implicit", "implicit=paper")
_METHODS = (
    f"{', '.join(_UNTRAINED)}, nor NAME=FILE with one of {', '.join(_WITH_FILE)}, nor multiview or multiview=BASE, "
    f"BASE one of {', '.join(_FEED_FORWARD)} or the FILE.safetensors of a jbu, and :VIEWS behind it or not"
)
# The last number is that of the views; a FILE may have colons of its own.
_MULTIVIEW = re.compile(r"multiview(?:=(?P<base>.+?))?(?::(?P<views>[1-9]\d*))?")


class MultiViewRow(NamedTuple):
    """A row ``multiview[=BASE][:VIEWS]``: its upsampler's name, the file of a jbu or nothing, and number of views."""

    base: UpsamplerName
    file: str
    views: int


def multiview_row(row: str) -> MultiViewRow | None:
    """What a row of multiview names; ``None`` for any other row."""
    match = _MULTIVIEW.fullmatch(row)
    if match is None:
        return None
    base, views = match["base"] or "bilateral", int(match["views"] or 16)
    if base.endswith(".safetensors"):
        return MultiViewRow("jbu", base, views)
    return MultiViewRow(cast(UpsamplerName, base), "", views) if base in _FEED_FORWARD else None


def row_file(row: str) -> str:
    """The file that a row names; nothing where it names none."""
    multiview = multiview_row(row)
    if multiview is not None:
        return multiview.file
    return "" if row in _UNTRAINED else row.partition("=")[2]


def _is_method(row: str) -> bool:
    name, _, file = row.partition("=")
    return row in _UNTRAINED or (name in _WITH_FILE and bool(file)) or multiview_row(row) is not None


def _is_expression(text: str | None) -> bool:
    try:
        return text is None or re.compile(text).groups > 0
    except re.error:
        return False


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PerImageOptions, BilateralOptions, DepthOptions, BackboneConfig):
    """Options of ``featup evaluate``: shards of labelled images in, a table of upsamplers out."""

    train: tuple[str, ...] = option(
        (), "segmentation: tar shards with seg.png to fit probes on", group="input", path=True
    )
    val: tuple[str, ...] = option((), "segmentation: tar shards with seg.png to evaluate on", group="input", path=True)
    classes: int | None = option(None, "segmentation: number of classes", group="input", at_least=1, at_most=65535)
    ignore_index: int = option(
        255, "segmentation: the class id of pixels without a label", group="input", at_least=0, at_most=65535
    )
    depth_train: tuple[str, ...] = option(
        (), "depth: tar shards with depth.png or depth.npy to fit probes on", group="input", path=True
    )
    depth_val: tuple[str, ...] = option(
        (), "depth: tar shards with depth.png or depth.npy to evaluate on", group="input", path=True
    )
    cam_shards: tuple[str, ...] = option(
        (), "class activation maps: tar shards with images, labels are not read", group="input", path=True
    )
    limit: int | None = option(
        None, "evaluate on so many images of each set, spread evenly over it", group="input", at_least=1
    )
    train_limit: int | None = option(
        None, "fit on so many images of each set, spread evenly over it", group="input", at_least=1
    )

    rows: tuple[str, ...] = option(
        ("nearest", "bilinear", "bicubic", "strided", "large_image", "bilateral"),
        "of the table, one a method: nearest, bilinear, bicubic, norm_bilinear (norms restored), guided_filter, "
        "bilateral, anyup, strided, large_image; trained, as NAME=FILE: anyup, jbu, resize_conv, carafe, sapa, ifa; "
        "views of each image: multiview[=BASE][:VIEWS], BASE the upsampler of their average or the FILE.safetensors "
        "of a jbu; fitted to each image: deep_image_prior, implicit, implicit=paper",
        group="upsampler",
        path=True,
    )
    prior_steps: int = option(300, "deep_image_prior: steps of a fit", group="upsampler", at_least=1)
    factor: int = option(
        2, "strided and large_image: how many times finer their features are", group="upsampler", at_least=1, at_most=64
    )

    views: int = option(
        0,
        "shifted views of an image, of whose variance the share explained by each method is measured; 0 for none",
        group="evaluation",
        at_least=0,
    )
    views_images: int = option(
        16, "images the views are warped from, spread over the set", group="evaluation", at_least=1
    )
    retrained: bool = option(True, "also fit probes on each method's own upsampled features", group="evaluation")
    pixels: int = option(
        100, "retrained: pixels of every training image that the probe is fitted on", group="evaluation", at_least=1
    )
    seeds: int = option(1, "retrained: probes, each fitted on other pixels", group="evaluation", at_least=1)
    protocol: Literal["none", "448"] = option(
        "none",
        "segmentation: 448 also trains a probe for every row as the field's tables do: AdamW, batch 2, mirrored "
        "images, cosine; their image size is 448",
        group="evaluation",
    )
    epochs: int = option(20, "protocol 448: passes over the training images", group="evaluation", at_least=1)
    max_vectors: int = option(
        200_000, "feature vectors a probe is fitted on, at most, sampled by a seed", group="evaluation", at_least=1
    )
    resamples: int = option(200, "of the images, for the intervals of differences", group="evaluation", at_least=1)
    cluster_by: str | None = option(
        None,
        "regular expression whose first group, in a key, names the image's sequence: sequences are resampled as a "
        "whole",
        group="evaluation",
    )
    pairs: bool = option(
        False, "also write a table of the differences between any two rows into table.md", group="evaluation"
    )
    pictures: int = option(6, "images of each set to draw pictures of", group="evaluation", at_least=0)

    batch_size: int = option(8, "images upsampled at once", group="run", run=True, at_least=1)

    @property
    def fits_networks(self) -> bool:
        """See :attr:`PerImageOptions.fits_networks`."""
        return any(row.partition("=")[0] == "implicit" for row in self.rows)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
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
            (
                self.protocol != "none" and not self.train,
                f"protocol={self.protocol} trains segmentation probes; give train, val and classes",
            ),
            (
                self.protocol != "none" and self.geometry != "center_crop",
                f"protocol={self.protocol} with geometry={self.geometry}: its images are centre crops, and other "
                "tables' figures are of these; give geometry center_crop",
            ),
            (not _is_expression(self.cluster_by), f"cluster_by={self.cluster_by!r} is no expression with a group"),
            (not self.rows, "rows is empty; name at least one upsampler"),
            *((not _is_method(row), f"rows: {row!r} is not one of {_METHODS}") for row in self.rows),
            (len(set(self.rows)) != len(self.rows), f"rows={self.rows}: one is named twice"),
        ]

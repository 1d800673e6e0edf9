"""Options of decoding: which configs have them, and what decoding is given."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from pipeline.decode.geometry import Geometry
from pipeline.decode.kinds import IMAGE_EXTS
from pipeline.options import Checked, Size, option

__all__ = ["DecodeOptions", "DepthOptions", "ImageOptions", "LabelKind", "LabelOptions", "SegDtype"]


LabelKind = Literal["seg", "depth", "cls"]
SegDtype = Literal["uint8", "uint16"]
# ImageNet's mean, which the usual normalisations make about zero.
_IMAGENET_MEAN = (124, 116, 104)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Checked):
    """How images are decoded."""

    geometry: Geometry = option(
        "squash",
        "how an image gets the backbone's size: squash, center_crop, or pad (keeps the aspect, with a valid mask)",
        group="decoding",
    )
    image_exts: tuple[str, ...] = option(
        IMAGE_EXTS, "extensions an image may have, lower case; the first present is read", group="decoding"
    )
    max_pixels: int = option(
        100_000_000, "a sample fails whose image or label has more pixels, by its header", group="decoding", at_least=1
    )
    max_bytes: int = option(
        256 << 20,
        "a sample fails whose image or label has more encoded bytes",
        group="decoding",
        run=True,
        at_least=1,
    )

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
            (
                not self.image_exts or any(ext != ext.lower().strip(". ") or not ext for ext in self.image_exts),
                f"image_exts={self.image_exts} must be lower-case extensions without a dot, at least one",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class DepthOptions(Checked):
    """How depth labels become metres."""

    depth_png_scale: float = option(0.001, "metres per unit of depth.png", group="decoding", above=0)
    depth_npy_scale: float = option(1.0, "metres per unit of depth.npy", group="decoding", above=0)


@dataclass(frozen=True, kw_only=True)
class LabelOptions(DepthOptions):
    """Which labels are decoded and how, and how long a sample may take."""

    labels: tuple[LabelKind, ...] = option(
        (), "labels every sample must have, stored beside the features: seg, depth, cls", group="decoding"
    )
    missing_label: Literal["fail", "keep"] = option(
        "fail",
        "a sample without one of its labels fails, or is kept with the label's unknown value and a flag (no_seg ...)",
        group="decoding",
    )
    seg_dtype: SegDtype = option(
        "uint8", "type of the stored class ids; its largest value means no label", group="decoding"
    )
    label_orientation: Literal["displayed", "stored"] = option(
        "displayed",
        "pixel grid of the labels of a photograph that EXIF turns, where their size cannot tell",
        group="decoding",
    )
    decode_timeout: float = option(
        60.0, "a sample fails whose decoding takes longer, in seconds", group="decoding", run=True, above=0
    )

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
            (len(set(self.labels)) != len(self.labels), f"labels={self.labels}: one is named twice"),
        ]


@dataclass(frozen=True)
class DecodeOptions(ImageOptions, LabelOptions):
    """What decoding is given: the options, and the sizes and the colour that follow from the rest of a config.

    Attributes:
        size: (height, width) of the decoded image.
        label_size: (height, width) of labels and valid mask, which show the same window; None: ``size``.
        fill: (r, g, b) of padding.
    """

    size: Size
    label_size: Size | None = None
    fill: tuple[int, int, int] = _IMAGENET_MEAN

    @classmethod
    def of(cls, options: Checked, **derived: Any) -> Self:
        """The decoding options that a config has, with what is derived; options it does not have keep their default."""
        names = [one.name for one in fields(cls) if hasattr(options, one.name)]
        return cls(**{name: getattr(options, name) for name in names} | derived)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._checks(),
            (
                min(*self.size, *(self.label_size or self.size)) < 1,
                f"size={self.size} must be at least 1 on both sides",
            ),
            (not all(0 <= value <= 255 for value in self.fill), f"fill={self.fill} must be between 0 and 255"),
        ]

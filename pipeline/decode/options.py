"""How samples become arrays."""

from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.decode.geometry import Geometry, Size
from pipeline.decode.kinds import IMAGE_EXTS, label_spec
from pipeline.errors import ConfigError

__all__ = ["DecodeOptions"]


@dataclass(frozen=True)
class DecodeOptions:
    """How samples become arrays; checked on construction.

    Attributes:
        size: (height, width) of the image that comes out.
        label_size: (height, width) of labels and valid mask, which show the same window; None: ``size``.
        geometry: see ``plan_transform``.
        labels: kinds of label every sample must have, from ``LABELS``.
        image_exts: lower-case WebDataset extensions of images; the first one present is used.
        max_pixels: an image or label with more pixels, by its header, is refused before it is decoded.
        max_bytes: a larger member, image or label, is not read.
        decode_timeout: seconds that the decoding of one sample may take.
        fill: (r, g, b) of padding. The default is ImageNet's mean, which normalises to about zero.
        seg_dtype: store dtype of ``seg``; larger class ids are refused.
        depth_png_scale: metres per step of ``depth.png``.
        depth_npy_scale: metres per unit of ``depth.npy``.
        label_orientation: the pixel grid of labels of a rotated photograph where their size cannot tell:
            ``displayed``, since annotation tools show photographs upright, or ``stored``.
        dct_scaling: decode a large JPEG at 1/2, 1/4 or 1/8 as long as twice ``size`` remains on both sides.

    Raises:
        ConfigError: an option out of its range.
    """

    size: Size
    label_size: Size | None = None
    geometry: Geometry = "center_crop"
    labels: tuple[str, ...] = ()
    image_exts: tuple[str, ...] = IMAGE_EXTS
    max_pixels: int = 100_000_000
    max_bytes: int = 256 << 20
    decode_timeout: float = 60.0
    fill: tuple[int, int, int] = (124, 116, 104)
    seg_dtype: Literal["uint8", "uint16"] = "uint8"
    depth_png_scale: float = 0.001
    depth_npy_scale: float = 1.0
    label_orientation: Literal["displayed", "stored"] = "displayed"
    dct_scaling: bool = True

    def __post_init__(self) -> None:
        for name, size in (("size", self.size), ("label_size", self.label_size or self.size)):
            if len(size) != 2 or min(size) < 1:
                raise ConfigError(f"{name} must be (height, width), both positive, got {size}")
        for name, value, allowed in (
            ("geometry", self.geometry, get_args(Geometry)),
            ("seg_dtype", self.seg_dtype, ("uint8", "uint16")),
            ("label_orientation", self.label_orientation, ("displayed", "stored")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for kind in self.labels:
            label_spec(kind)
        if not self.image_exts or any(ext != ext.lower().lstrip(".") for ext in self.image_exts):
            raise ConfigError(f"image_exts must be lower-case extensions without a dot, got {self.image_exts}")
        if self.max_pixels < 1:
            raise ConfigError(f"max_pixels must be positive, got {self.max_pixels}")
        if len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill):
            raise ConfigError(f"fill must be (r, g, b), each 0 to 255, got {self.fill}")
        for name, scale in (("png", self.depth_png_scale), ("npy", self.depth_npy_scale)):
            if not 0 < scale < float("inf"):
                raise ConfigError(f"depth_{name}_scale must be positive and finite, got {scale}")

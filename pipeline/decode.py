"""Bytes of one sample -> aligned uint8 image and label arrays.

Bytes are judged by their content, never by a name, and never trusted: whatever they are, the result is a
whole picture or a ``SampleError`` that says why not. Size limits hold before anything is decoded.

Two decoders. simplejpeg (libjpeg-turbo, strict) takes JPEG, since it reports bit errors that Pillow turns
into grey or smeared pixels without a word; Pillow takes the rest. What leaves a mark in ``flags``:

- ``exif_rotated``: EXIF orientation is applied, so pixels are in displayed orientation (XMP's is ignored).
- ``alpha``: transparency is composited over white.
- ``animated``: more than one frame or page; the first is used.
- ``sixteen_bit``: grey is scaled as ``round(v * 255 / max)``. Pillow itself reduces 16-bit colour, to
  ``v >> 8``, which is within 1 of exact scaling.
- ``grey``, ``palette``, ``cmyk``: converted to RGB. CMYK JPEG follows Adobe's inverted convention, as
  browsers do.
- ``dct_scaled``: a JPEG decoded at 1/2, 1/4 or 1/8 because the output needs no more.
- ``lenient``: a JPEG with chroma sampling that simplejpeg refuses; Pillow decoded it, blind to bit errors.
- ``warned``: Pillow warned while decoding (damaged EXIF, odd palette ...), or the EXIF block was unreadable.
- ``label_reoriented``: a label came in the stored grid and was turned with its image.

Embedded colour profiles are ignored: pixel values are taken as sRGB, as the backbones' training did.
"""

import hashlib
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.errors import ConfigError, Reason, SampleError
from pipeline.geometry import (
    Geometry,
    Size,
    Transform,
    Window,
    apply_image,
    apply_label,
    orient,
    orient_window,
    plan_transform,
    valid_mask,
)

__all__ = [
    "IMAGE_EXTS",
    "LABELS",
    "DecodeOptions",
    "DecodedImage",
    "LabelSpec",
    "PreparedSample",
    "decode_image",
    "decode_label",
    "label_spec",
    "prepare_sample",
    "sniff",
]

IMAGE_EXTS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jfif", "avif", "jp2")
_ORIENTATION_TAG = 274
_SIGNATURES = tuple(
    (kind, re.compile(pattern, re.DOTALL))
    for kind, pattern in (
        ("jpeg", rb"\xff\xd8\xff"),
        ("png", rb"\x89PNG\r\n\x1a\n"),
        ("gif", rb"GIF8[79]a"),
        ("webp", rb"RIFF....WEBP"),
        ("bmp", rb"BM.{12}[\x0c\x28-\x80]\0\0\0"),
        ("tiff", rb"II[*+]\0|MM\0[*+]"),
        ("ppm", rb"P[1-6][ \t\r\n#]"),
        ("avif", rb"....ftyp(?:....){0,12}avi[fs]"),
        ("jp2", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
        ("heic", rb"....ftyp(?:hei[cmsx]|hev[cmx]|mif1|msf1)"),
        ("jxl", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
        ("psd", rb"8BPS\0"),
        ("exr", rb"\x76\x2f\x31\x01"),
        ("pdf", rb"%PDF-"),
        ("html", rb"(?:\xef\xbb\xbf)?\s*<(?i:!doctype|html|head|body|\?xml|svg|error)"),
    )
)
_PILLOW_FORMATS = {
    "jpeg": ("JPEG",),
    "png": ("PNG",),
    "gif": ("GIF",),
    "webp": ("WEBP",),
    "bmp": ("BMP",),
    "tiff": ("TIFF",),
    "ppm": ("PPM",),
    "avif": ("AVIF",),
    "jp2": ("JPEG2000",),
}
_PILLOW_LOCK = threading.RLock()


@dataclass(frozen=True)
class DecodedImage:
    """A decoded photograph.

    Attributes:
        pixels: uint8 [h, w, 3], RGB, as displayed; smaller than ``source_size`` if ``dct_scaled``.
        source_size: (height, width) as displayed, at full resolution.
        extent: (top, left, height, width), the part of ``pixels`` that shows the whole source; less than
            all of it only where a scaled JPEG ends in a part of a pixel.
        orientation: EXIF orientation as found, 1 to 8; 1 when there is none.
        decoder: ``simplejpeg`` or ``pillow``.
        flags: what was met and done on the way, sorted; the module's text lists them.
    """

    pixels: npt.NDArray[np.uint8]
    source_size: Size
    extent: Window
    orientation: int
    decoder: Literal["simplejpeg", "pillow"]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class LabelSpec:
    """One kind of label: where it comes from and how it is stored.

    Attributes:
        kind: its name, and the name of its array in the store.
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


def label_spec(kind: str, seg_dtype: Literal["uint8", "uint16"] = "uint8") -> LabelSpec:
    """``LABELS[kind]``, with ``seg`` stored as uint16 and filled with 65535 where that is asked for.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in LABELS:
        raise ConfigError(f"unknown label kind {kind!r}; choose from {', '.join(LABELS)}")
    if kind == "seg" and seg_dtype == "uint16":
        return replace(LABELS[kind], dtype="uint16", fill=65535)
    return LABELS[kind]


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


@dataclass(frozen=True)
class PreparedSample:
    """One sample, ready for a batch.

    Attributes:
        image: uint8 [H, W, 3].
        labels: kind -> [*label_size], or [] for ``cls``, in the dtype of ``label_spec``.
        valid: bool [*label_size], False where the image is padding.
        transform: from source pixels, as displayed, to the labels' pixels.
        flags: the image's, and ``label_reoriented``; sorted.
        orientation: EXIF orientation as found.
        decoder: ``simplejpeg`` or ``pillow``.
        sha256: hex digest of the image's bytes.
    """

    image: npt.NDArray[np.uint8]
    labels: dict[str, npt.NDArray[Any]]
    valid: npt.NDArray[np.bool_]
    transform: Transform
    flags: tuple[str, ...]
    orientation: int
    decoder: Literal["simplejpeg", "pillow"]
    sha256: str


def sniff(data: bytes) -> str | None:
    """The file type by its first bytes: ``jpeg``, ``png``, ``heic``, ``html`` ...; None when unknown."""
    return next((kind for kind, pattern in _SIGNATURES if pattern.match(data)), None)


def decode_image(data: bytes, *, max_pixels: int, min_size: Size | None = None) -> DecodedImage:
    """Decode a photograph of any common format into displayed orientation.

    Args:
        data: the whole file.
        max_pixels: height times width allowed, at full resolution.
        min_size: (height, width) the caller will resample to, as displayed. A JPEG may then be decoded at
            1/2, 1/4 or 1/8, as long as at least twice that remains on both sides.

    Raises:
        SampleError: ``UNDECODABLE`` (not an image, or damaged), ``TRUNCATED``, ``UNSUPPORTED`` (a format or
            pixel type that is known and not read), ``TOO_LARGE``.
    """
    kind = sniff(data)
    if kind is None or kind == "html":
        hint = "; it looks like a web page saved under an image's name" if kind == "html" else ""
        raise SampleError(
            Reason.UNDECODABLE, f"{len(data)} bytes that are no known image: they begin {data[:24]!r}{hint}"
        )
    if kind not in _PILLOW_FORMATS:
        raise SampleError(
            Reason.UNSUPPORTED,
            f"{kind} is not read here (the bytes begin {data[:16]!r}); convert it to one of "
            f"{', '.join(_PILLOW_FORMATS)}",
        )
    flags: set[str] = set()
    with _failing_as(kind, Reason.UNDECODABLE):
        if kind == "jpeg" and (decoded := _decode_jpeg(data, max_pixels, min_size, flags)) is not None:
            return decoded
        with _controlled(flags):
            pixels, orientation = _decode_with_pillow(data, kind, max_pixels, flags)
    return _decoded(pixels, pixels.shape[:2], None, orientation, "pillow", flags)


def decode_label(
    kind: str,
    ext: str,
    data: bytes,
    *,
    max_pixels: int = 100_000_000,
    depth_png_scale: float = 0.001,
    depth_npy_scale: float = 1.0,
    flags: set[str] | None = None,
) -> npt.NDArray[Any]:
    """Decode one label, at the size it is stored in.

    Args:
        kind: of ``LABELS``.
        ext: WebDataset extension, one of the kind's.
        data: the whole file.
        max_pixels: height times width allowed.
        depth_png_scale: metres per step of ``depth.png``.
        depth_npy_scale: metres per unit of ``depth.npy``.
        flags: gets ``warned`` when the decoder warned.

    Returns:
        ``seg``: [h, w] class ids as stored, uint8 or (16-bit file) uint16; a palette gives its indices.
        ``depth``: float32 [h, w] in metres; unknown (zero, negative, not finite) is NaN. ``cls``: int64 [].

    Raises:
        SampleError: ``LABEL_UNDECODABLE``, ``LABEL_RANGE``, or ``TOO_LARGE``.
        ConfigError: an unknown kind, or an extension that is not the kind's.
    """
    spec = label_spec(kind)
    if ext not in spec.extensions:
        raise ConfigError(f"a {kind} label is read from {', '.join(spec.extensions)}, not from {ext!r}")
    flags = set() if flags is None else flags
    with _failing_as(ext, Reason.LABEL_UNDECODABLE):
        if kind == "cls":
            return _read_class(data)
        if kind == "seg":
            return _read_png_values(data, ext, max_pixels, palette=True, flags=flags)
        if ext == "depth.png":
            return _metres(_read_png_values(data, ext, max_pixels, False, flags), depth_png_scale)
        with _controlled(flags):
            return _metres(_read_npy(data, max_pixels), depth_npy_scale)


def prepare_sample(members: Mapping[str, bytes], options: DecodeOptions) -> PreparedSample:
    """Decode a sample's image and labels and bring them to the output size through one transform.

    A label must have the photograph's size. Where EXIF turns the photograph, a label may lie in the displayed
    or in the stored pixel grid: its size decides, and where it fits both, ``options.label_orientation`` does.

    Args:
        members: WebDataset extension (``jpg``, ``seg.png`` ...; lower case) -> bytes.
        options: what to make of them.

    Raises:
        SampleError: the image or a label is missing, cannot be decoded, or does not fit.
    """
    data = _first(members, options.image_exts, "image", Reason.IMAGE_MISSING)[1]
    min_size = options.size if options.dct_scaling else None
    decoded = decode_image(data, max_pixels=options.max_pixels, min_size=min_size)
    transform = plan_transform(options.geometry, decoded.source_size, options.size)
    label_transform = transform.resized(options.label_size or options.size)
    flags = set(decoded.flags)
    labels: dict[str, npt.NDArray[Any]] = {}
    for kind in options.labels:
        spec = label_spec(kind, options.seg_dtype)
        ext, label_data = _first(members, spec.extensions, f"{kind} label", Reason.LABEL_MISSING)
        label = decode_label(
            kind,
            ext,
            label_data,
            max_pixels=options.max_pixels,
            depth_png_scale=options.depth_png_scale,
            depth_npy_scale=options.depth_npy_scale,
            flags=flags,
        )
        if kind == "seg" and label.size and label.max() > np.iinfo(spec.dtype).max:
            raise SampleError(
                Reason.LABEL_RANGE,
                f"{ext} holds class id {label.max()}, more than {spec.dtype} can; set seg_dtype to uint16",
            )
        if spec.per_pixel:
            upright = _displayed(label, decoded, options.label_orientation, ext)
            if upright is not label:
                flags.add("label_reoriented")
            label = apply_label(upright.astype(spec.dtype, copy=False), label_transform, spec.fill)
        labels[kind] = label
    return PreparedSample(
        image=apply_image(decoded.pixels, transform, options.fill, decoded.extent),
        labels=labels,
        valid=valid_mask(label_transform),
        transform=label_transform,
        flags=tuple(sorted(flags)),
        orientation=decoded.orientation,
        decoder=decoded.decoder,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _first(members: Mapping[str, bytes], exts: tuple[str, ...], what: str, missing: Reason) -> tuple[str, bytes]:
    """The first of ``exts`` that the sample has, and its bytes."""
    for ext in exts:
        if ext in members:
            return ext, members[ext]
    present = ", ".join(sorted(ext for ext in members if not ext.startswith("__"))) or "nothing"
    raise SampleError(missing, f"no {what} ({', '.join(exts)}) in the sample, which has {present}")


def _displayed(
    label: npt.NDArray[Any], image: DecodedImage, default: Literal["displayed", "stored"], ext: str
) -> npt.NDArray[Any]:
    """The label in the displayed grid: itself, or turned as its image was."""
    displayed = image.source_size
    stored = displayed[::-1] if image.orientation >= 5 else displayed
    if label.shape not in (displayed, stored):
        raise SampleError(
            Reason.LABEL_SIZE,
            f"{ext} has size (height, width) = {label.shape}, its image {displayed}"
            + (f", or {stored} before EXIF orientation {image.orientation}" if image.orientation > 1 else "")
            + "; labels must be annotated on the photograph at its full size",
        )
    told = displayed != stored
    in_stored_grid = label.shape == stored if told else default == "stored" and image.orientation > 1
    return orient(label, image.orientation) if in_stored_grid else label


@contextmanager
def _failing_as(what: str, reason: Reason) -> Iterator[None]:
    """Turn whatever a decoder raises on bad bytes into a SampleError."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # its own text holds nothing but a memory address
            text = "its header is damaged or cut short"
        if reason is Reason.UNDECODABLE and re.search("truncat|premature end of jpeg", text, re.IGNORECASE):
            reason = Reason.TRUNCATED
        raise SampleError(reason, f"{what} cannot be decoded: {text}; fetch or encode the file again") from error


@contextmanager
def _controlled(flags: set[str]) -> Iterator[None]:
    """Decode under our rules: warnings become the flag ``warned``, no switch of the process loosens Pillow.

    Warning filters and Pillow's switches belong to the process, so they are set under a lock and put back.
    The size limit is ours, checked from the header; Pillow's would warn at another number.
    """
    with _PILLOW_LOCK, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        switches = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = switches
            if caught:
                flags.add("warned")


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise SampleError(
            Reason.TOO_LARGE,
            f"(height, width) = ({height}, {width}) is {height * width} pixels by its header, more than "
            f"max_pixels = {max_pixels}; raise max_pixels if such photographs are meant to be in the data",
        )


def _decode_jpeg(data: bytes, max_pixels: int, min_size: Size | None, flags: set[str]) -> DecodedImage | None:
    """Decode strictly with simplejpeg; None where Pillow must: CMYK, and sampling that simplejpeg refuses."""
    exif, scan = _jpeg_segments(data)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(height, width, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(data, colorspace="CMYK")  # for its bit-error check; Pillow converts the colours
            return None
        orientation = _exif_orientation(exif, flags)
        scale = 1
        if min_size is not None:
            least_h, least_w = min_size[::-1] if orientation >= 5 else min_size
            scales = (n for n in (8, 4, 2) if height // n >= 2 * least_h and width // n >= 2 * least_w)
            scale = next(scales, 1)
        # libjpeg rounds a scaled size up, and simplejpeg takes the smallest not below what is asked for.
        pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale))
    except SampleError:
        raise
    except ValueError as error:
        if scan is None or data.find(b"\xff\xd9", scan) < 0:
            raise ValueError(f"truncated, {len(data)} bytes without an end-of-image marker ({error})") from error
        if "subsampling level" in str(error):
            flags.add("lenient")
            return None
        if re.search("data precision|SOF type", str(error)):
            raise SampleError(Reason.UNSUPPORTED, f"jpeg of a kind that is not read: {error}") from error
        raise
    if colorspace == "Gray":
        flags.add("grey")
    if scale > 1:
        flags.add("dct_scaled")
    extent, _ = orient_window((0.0, 0.0, height / scale, width / scale), pixels.shape[:2], orientation)
    size = (width, height) if orientation >= 5 else (height, width)
    return _decoded(orient(pixels, orientation), size, extent, orientation, "simplejpeg", flags)


def _decoded(
    pixels: npt.NDArray[np.uint8],
    source_size: Size,
    extent: Window | None,
    orientation: int,
    decoder: Literal["simplejpeg", "pillow"],
    flags: set[str],
) -> DecodedImage:
    if orientation > 1:
        flags.add("exif_rotated")
    return DecodedImage(
        pixels=np.ascontiguousarray(pixels),
        source_size=source_size,
        extent=extent or (0.0, 0.0, float(pixels.shape[0]), float(pixels.shape[1])),
        orientation=orientation,
        decoder=decoder,
        flags=tuple(sorted(flags)),
    )


def _jpeg_segments(data: bytes) -> tuple[bytes, int | None]:
    """A JPEG's EXIF payload (empty when there is none), and where its first scan begins (None: never)."""
    exif, at = b"", 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xDA:
            return exif, at  # a byte that is no marker is damage, and for the decoder to report
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD9:
            at += 1 if marker == 0xFF else 2  # padding, or a marker without a payload
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and not exif and data.startswith(b"Exif\0\0", at + 4):
            exif = data[at + 4 : end]
        at = end
    return exif, None


def _exif_orientation(payload: bytes, flags: set[str]) -> int:
    """The orientation, 1 to 8, in an EXIF block's first directory; 1 when it holds none, or nonsense."""
    tiff = payload.removeprefix(b"Exif\0\0")
    if not tiff:
        return 1
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    try:
        if order is None:
            raise struct.error("no TIFF header")
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == _ORIENTATION_TAG:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        flags.add("warned")
    return 1


def _check_container(kind: str, data: bytes) -> None:
    """Raise ValueError where the container itself tells that bytes are missing or changed.

    Pillow does not verify the checksums of a PNG's pixel data.
    """
    if kind == "webp" and (declared := 8 + int.from_bytes(data[4:8], "little")) > len(data):
        raise ValueError(f"truncated: {len(data)} of {declared} bytes")
    at = 8
    while kind == "png":
        length = int.from_bytes(data[at : at + 4], "big")
        name, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            raise ValueError(f"truncated: {len(data)} bytes, in or before a chunk that ends at byte {end}")
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError(f"the checksum of chunk {name!r} at byte {at} does not match: its bytes were changed")
        if name == b"IEND":
            return
        at = end


def _decode_with_pillow(data: bytes, kind: str, max_pixels: int, flags: set[str]) -> tuple[npt.NDArray[np.uint8], int]:
    """uint8 [h, w, 3] in displayed orientation, and the EXIF orientation found."""
    _check_container(kind, data)
    image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS[kind])
    _check_pixels(image.height, image.width, max_pixels)
    if getattr(image, "is_animated", False):
        flags.add("animated")
    if kind != "tiff":
        image.load()
        # A PNG may carry its EXIF block behind the pixels.
        orientation = _exif_orientation(image.info.get("exif", b""), flags)
        return orient(_to_rgb(image, kind, data, flags), orientation), orientation
    # Pillow itself turns a TIFF while loading it, and drops the tag.
    orientation = _tiff_tags(image).get(_ORIENTATION_TAG, 1)
    pixels = _to_rgb(image, kind, data, flags)
    return pixels, orientation if orientation in range(1, 9) else 1


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def _to_rgb(image: Image.Image, kind: str, data: bytes, flags: set[str]) -> npt.NDArray[np.uint8]:
    """uint8 [h, w, 3] of a Pillow image in any mode."""
    mode, tags = image.mode, _tiff_tags(image)
    depth = data[24] if kind == "png" else max(tags.get(258, (16 if mode.startswith("I") else 8,)))
    if mode == "F" or (mode == "I" and kind != "ppm"):
        raise SampleError(
            Reason.UNSUPPORTED,
            f"{kind} with {'float' if mode == 'F' else 'signed or 32-bit'} pixels (mode {mode}) has no "
            "defined white; convert it to 8 or 16 bits",
        )
    names = {
        "1": "grey",
        "L": "grey",
        "LA": "grey",
        "I": "grey",
        "P": "palette",
        "PA": "palette",
        "CMYK": "cmyk",
    }
    if name := names.get(mode.partition(";")[0]):
        flags.add(name)
    if depth > 8:
        flags.add("sixteen_bit")
    key = image.info.get("transparency")
    if image.has_transparency_data:
        flags.add("alpha")
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        top = (1 << depth) - 1
        grey = ((values * 255 + top // 2) // top).astype(np.uint8)
        if tags.get(262) == 0:  # TIFF: white is zero
            grey = 255 - grey
        if key is not None:
            grey[values == key] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if kind == "png" and mode in ("L", "RGB") and key is not None:
        # The transparent colour is given at the file's depth, the pixels come at 8 bits.
        parts = key if mode == "RGB" else (key,)
        eight = tuple(v >> 8 if depth == 16 else v * 255 // ((1 << depth) - 1) for v in parts)
        image.info["transparency"] = eight if mode == "RGB" else eight[0]
    if image.has_transparency_data:
        upright = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", upright.size, (255, 255, 255, 255)), upright)
    return np.array(image.convert("RGB"))


def _read_png_values(
    data: bytes, ext: str, max_pixels: int, palette: bool, flags: set[str]
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """The numbers a grey PNG stores (or a palette one's indices), uint8 or uint16 [h, w]."""
    if sniff(data) != "png":
        raise ValueError(f"it is {sniff(data) or 'no known image'}, beginning {data[:16]!r}; PNG is needed")
    with _controlled(flags):
        _check_container("png", data)
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        _check_pixels(image.height, image.width, max_pixels)
        depth, colour = data[24], data[25]
        if colour not in ((0, 3) if palette else (0,)) or (depth < 8 and not palette):
            kind = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}[colour]
            raise ValueError(
                f"it is a {depth}-bit {kind} PNG; {ext} must be "
                + ("grey or palette: class ids, not colours" if palette else "8- or 16-bit grey")
            )
        values = np.array(image)
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if colour == 0 and depth < 8:  # Pillow spreads 2- and 4-bit grey over 0 to 255
        return values // np.uint8(255 // ((1 << depth) - 1))
    return values


def _read_npy(data: bytes, max_pixels: int) -> npt.NDArray[Any]:
    """A numeric [h, w] or [h, w, 1] array file, as [h, w]; its header is checked before memory is taken."""
    stream = io.BytesIO(data)
    npy: Any = np.lib.format  # numpy leaves these functions untyped
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    read_header = readers.get(npy.read_magic(stream))
    if read_header is None:
        raise ValueError("its NPY version is not 1.0 or 2.0, which are all that numbers need")
    shape, _, dtype = read_header(stream)
    if dtype.kind not in "fiu" or len(shape) not in (2, 3) or shape[2:] not in ((), (1,)):
        raise ValueError(f"it holds {dtype} of shape {shape}; floats or integers [h, w] or [h, w, 1] are needed")
    _check_pixels(shape[0], shape[1], max_pixels)
    stream.seek(0)
    values: npt.NDArray[Any] = npy.read_array(stream, allow_pickle=False)
    return values.reshape(shape[:2])


def _metres(values: npt.NDArray[Any], scale: float) -> npt.NDArray[np.float32]:
    """float32 metres; NaN where the value is zero, negative or not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        metres = (values.astype(np.float64) * scale).astype(np.float32)
    metres[~((metres > 0) & (metres < np.inf))] = np.nan
    return metres


def _read_class(data: bytes) -> npt.NDArray[np.int64]:
    text = data.decode("utf-8-sig").strip()
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        raise ValueError(f"{text[:40]!r} is not an integer")
    value = int(text)
    if not 0 <= value <= np.iinfo(np.int64).max:
        raise SampleError(Reason.LABEL_RANGE, f"class id {value} is not in 0 to {np.iinfo(np.int64).max}")
    return np.array(value, np.int64)

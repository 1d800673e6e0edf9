"""One sample's bytes to its aligned image and label arrays.

The file type follows from the content, never from the name, and bytes are never trusted: the result is a whole
picture or a ``SampleError`` that says why not. Size limits hold before anything is decoded.

simplejpeg (libjpeg-turbo, strict) decodes JPEG, because it reports bit errors that Pillow silently turns into grey or
smeared pixels; Pillow decodes the other formats. ``flags`` records what was special about a photograph:

- ``exif_rotated``: EXIF orientation is applied, so pixels are in displayed orientation (XMP's is ignored).
- ``alpha``: transparency is composited over white.
- ``animated``: more than one frame or page; the first is used.
- ``sixteen_bit``: grey is scaled as ``round(v * 255 / max)``. Pillow itself reduces 16-bit colour, to ``v >> 8``, which
  is within 1 of exact scaling.
- ``grey``, ``palette``, ``cmyk``: converted to RGB. CMYK JPEG follows Adobe's inverted convention, as browsers do.
- ``dct_scaled``: a JPEG decoded at 1/2, 1/4 or 1/8 because the output needs no more.
- ``lenient``: a JPEG with chroma sampling that simplejpeg refuses; Pillow decoded it without reporting bit errors.
- ``warned``: Pillow warned while decoding (damaged EXIF, odd palette ...), or the EXIF block was unreadable.
- ``label_reoriented``: a label came in the stored grid and was turned with its image.

Embedded colour profiles are ignored: pixel values are taken as sRGB, as the backbones' training did.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.decode.common import PILLOW_FORMATS, DecodedImage, as_displayed, controlled, failing_as
from pipeline.decode.geometry import (
    Size,
    Transform,
    apply_image,
    apply_label,
    orient,
    plan_transform,
    valid_mask,
)
from pipeline.decode.jpeg import decode_jpeg
from pipeline.decode.kinds import label_spec
from pipeline.decode.labels import decode_label
from pipeline.decode.members import IMAGE, check_bytes, select_members
from pipeline.decode.options import DecodeOptions
from pipeline.decode.pillow import decode_with_pillow
from pipeline.decode.sniff import sniff
from pipeline.errors import Reason, SampleError

__all__ = ["PreparedSample", "decode_image", "prepare_sample"]


@dataclass(frozen=True)
class PreparedSample:
    """One sample, ready for a batch.

    Attributes:
        image: uint8 [H, W, 3].
        labels: kind -> [*label_size], or [] for ``cls``, in the dtype of ``label_spec``.
        transform: from source pixels, as displayed, to the labels' pixels.
        flags: the image's, and ``label_reoriented``; sorted.
        orientation: EXIF orientation in the file, 1 to 8.
        decoder: ``simplejpeg`` or ``pillow``.
    """

    image: npt.NDArray[np.uint8]
    labels: dict[str, npt.NDArray[Any]]
    transform: Transform
    flags: tuple[str, ...]
    orientation: int
    decoder: Literal["simplejpeg", "pillow"]

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Bool [*label_size], False where the image is padding."""
        return valid_mask(self.transform)


def decode_image(data: bytes, *, max_pixels: int, min_size: Size | None = None) -> DecodedImage:
    """Decode a photograph of any common format into displayed orientation.

    Args:
        data: the whole file.
        max_pixels: height times width allowed, at full resolution.
        min_size: (height, width) the caller will resample to, as displayed. A JPEG may then be decoded at
            1/2, 1/4 or 1/8, as long as at least twice that remains on both sides.

    Raises:
        SampleError: ``UNDECODABLE`` (not an image, or damaged), ``TRUNCATED``, ``UNSUPPORTED`` (a format or
            pixel type that is known and not read), ``TOO_LARGE`` (too many pixels, or too many scans).
    """
    kind = sniff(data)
    if kind is None or kind == "html":
        hint = "; it looks like a web page saved under an image's name" if kind == "html" else ""
        raise SampleError(
            Reason.UNDECODABLE, f"{len(data)} bytes that are no known image: they begin {data[:24]!r}{hint}"
        )
    if kind not in PILLOW_FORMATS:
        raise SampleError(
            Reason.UNSUPPORTED,
            f"{kind} is not read here (the bytes begin {data[:16]!r}); convert it to one of "
            f"{', '.join(PILLOW_FORMATS)}",
        )
    flags: set[str] = set()
    with failing_as(kind, Reason.UNDECODABLE):
        if kind == "jpeg" and (decoded := decode_jpeg(data, max_pixels, min_size, flags)) is not None:
            return decoded
        with controlled(flags):
            pixels, orientation = decode_with_pillow(data, kind, max_pixels, flags)
    return as_displayed(pixels, Size(*pixels.shape[:2]), None, orientation, "pillow", flags)


def prepare_sample(members: Mapping[str, bytes], options: DecodeOptions) -> PreparedSample:
    """Decode a sample's image and labels and bring them to the output size through one transform.

    A label must have the photograph's size. Where EXIF turns the photograph, a label may lie in the displayed
    or in the stored pixel grid: its size decides, and where it fits both, ``options.label_orientation`` does.

    This decodes in the calling process, under the limits that need no clock (bytes, pixels, scans);
    ``options.decode_timeout`` holds only where :class:`pipeline.decode.worker.DecoderProcess` decodes.

    Args:
        members: WebDataset extension (``jpg``, ``seg.png`` ...; lower case) -> bytes.
        options: output sizes, kinds of labels and limits.

    Raises:
        SampleError: the image or a label is missing, too large, cannot be decoded, or does not fit; with
            ``options.missing_label="keep"`` a label that is missing is left out and flagged ``no_KIND``.
    """
    selected = select_members(members, options)
    check_bytes(((ext, len(members[ext])) for ext in selected.values()), options.max_bytes)
    data = members[_required(IMAGE, selected, options)]
    decoded = decode_image(data, max_pixels=options.max_pixels, min_size=options.size)
    transform = plan_transform(options.geometry, decoded.source_size, options.size)
    label_transform = transform.resized(options.label_size or options.size)
    flags = set(decoded.flags)
    labels: dict[str, npt.NDArray[Any]] = {}
    for kind in options.labels:
        spec = label_spec(kind, options.seg_dtype)
        if kind not in selected and options.missing_label == "keep":
            flags.add(f"no_{kind}")
            continue
        ext = _required(kind, selected, options)
        label = decode_label(
            kind,
            ext,
            members[ext],
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
        transform=label_transform,
        flags=tuple(sorted(flags)),
        orientation=decoded.orientation,
        decoder=decoded.decoder,
    )


def _required(kind: str, selected: Mapping[str, str], options: DecodeOptions) -> str:
    """The extension of the image or of a label that the sample must have."""
    if kind in selected:
        return selected[kind]
    image = kind == IMAGE
    accepted = options.image_exts if image else label_spec(kind, options.seg_dtype).extensions
    raise SampleError(
        Reason.IMAGE_MISSING if image else Reason.LABEL_MISSING,
        f"no {kind if image else f'{kind} label'} ({', '.join(accepted)}) in the sample",
    )


def _displayed(
    label: npt.NDArray[Any], image: DecodedImage, default: Literal["displayed", "stored"], ext: str
) -> npt.NDArray[Any]:
    """The label in the displayed grid: itself, or turned as its image was."""
    displayed = tuple(image.source_size)
    stored = displayed[::-1] if image.orientation >= 5 else displayed
    if label.shape not in (displayed, stored):
        raise SampleError(
            Reason.LABEL_SIZE,
            f"{ext} has size (height, width) = {label.shape}, its image {displayed}"
            + (f", or {stored} before EXIF orientation {image.orientation}" if image.orientation > 1 else "")
            + "; labels must be annotated on the photograph at its full size",
        )
    size_decides = displayed != stored
    in_stored_grid = label.shape == stored if size_decides else default == "stored" and image.orientation > 1
    return orient(label, image.orientation) if in_stored_grid else label

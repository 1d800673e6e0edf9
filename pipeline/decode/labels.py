"""Label decoding: class maps, depth maps, class ids."""

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.decode.common import check_container, check_pixels, controlled, failing_as, without_png_text
from pipeline.decode.kinds import label_spec
from pipeline.decode.sniff import sniff
from pipeline.errors import ConfigError, Reason, SampleError

__all__ = ["decode_label"]


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
    with failing_as(ext, Reason.LABEL_UNDECODABLE):
        if kind == "cls":
            return _read_class(data)
        if kind == "seg":
            return _read_png_values(data, ext, max_pixels, palette=True, flags=flags)
        if ext == "depth.png":
            return _metres(_read_png_values(data, ext, max_pixels, False, flags), depth_png_scale)
        with controlled(flags):
            return _metres(_read_npy(data, max_pixels), depth_npy_scale)


def _read_png_values(
    data: bytes, ext: str, max_pixels: int, palette: bool, flags: set[str]
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """The numbers a grey PNG stores (or a palette one's indices), uint8 or uint16 [h, w]."""
    if sniff(data) != "png":
        raise ValueError(f"it is {sniff(data) or 'no known image'}, beginning {data[:16]!r}; PNG is needed")
    with controlled(flags):
        check_container("png", data)
        data = without_png_text(data)
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        check_pixels(image.height, image.width, max_pixels)
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
    check_pixels(shape[0], shape[1], max_pixels)
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

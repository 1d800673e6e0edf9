"""Videos that tests make: each frame shows its number, and its corner says which way is up."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.inputs.images import ImageList, list_images
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import ShardIndex

EXTS = ("jpg", "jpeg", "png", "ppm")
LABELS = {"seg": ("seg.png",), "depth": ("depth.png", "depth.npy"), "cls": ("cls", "cls.txt")}
# Groups of ten; in the second kind the frames before a keyframe are made from it, so that they cannot be decoded alone.
CLOSED = {"x264-params": "bframes=3:b-adapt=0:keyint=10:min-keyint=10:scenecut=0"}
OPEN = {"x264-params": "bframes=3:b-adapt=0:keyint=10:min-keyint=10:scenecut=0:open-gop=1"}
BLOCK, BITS = 8, 7


def picture(number: int, size: tuple[int, int] = (48, 64), noise: int = 0) -> NDArray[np.uint8]:
    """A frame, uint8 ``[H, W, 3]``: grey, with a red corner at the top left, its number in blocks, and noise below."""
    pixels = np.full((*size, 3), 100, np.uint8)
    pixels[:12, :12] = (255, 0, 0)
    for bit in range(BITS):
        pixels[16:24, bit * BLOCK : (bit + 1) * BLOCK] = 230 if number >> bit & 1 else 20
    if noise:
        pixels[size[0] // 2 :] = np.random.default_rng(number).integers(0, noise, (size[0] - size[0] // 2, size[1], 3))
    return pixels


def write_video(
    path: Path,
    count: int = 30,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (48, 64),
    times: Sequence[int] | None = None,
    ticks: int = 1000,
    rotation: int = 0,
    mirrored: bool = False,
    noise: int = 0,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A video of ``count`` frames at 25 a second, or at ``times`` in milliseconds, stored as ``ticks`` a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 10
        if times is not None:
            stream.codec_context.time_base = Fraction(1, ticks)
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, size, noise))
            if times is not None:
                frame.pts, frame.time_base = times[number] * ticks // 1000, Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file of half a second of silence and no pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def listed(*places: object, **options: object) -> ImageList:
    return list_images([str(place) for place in places], EXTS, LABELS, {}, **options)  # type: ignore[arg-type]


def index_of(images: ImageList) -> ShardIndex:
    return ShardIndex("", 0, "", tuple(images.samples), ())


def read(images: ImageList, *numbers: int) -> list[object]:
    """The pixels of frames, uint8 ``[H, W, 3]``, or why there are none; all in order where no numbers are given."""
    index = index_of(images)
    if numbers:
        found = [one for number in numbers for one in read_samples(index, number, number + 1)]
    else:
        found = read_samples(index, 0, len(index.samples))
    return [one if isinstance(one, Exception) else pixels(one["ppm"]) for one in found]


def pixels(data: bytes) -> NDArray[np.uint8]:
    """A PPM file as uint8 ``[H, W, 3]``."""
    magic, size, depth, rest = data.split(b"\n", 3)
    assert (magic, depth) == (b"P6", b"255")
    width, height = map(int, size.split())
    return np.frombuffer(rest, np.uint8).reshape(height, width, 3)


def number_of(pixels: object) -> int:
    """Which frame this is, by its blocks."""
    assert isinstance(pixels, np.ndarray), pixels
    return sum((pixels[18:22, bit * BLOCK + 2 : bit * BLOCK + 6].mean() > 128) << bit for bit in range(BITS))

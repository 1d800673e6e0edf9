"""A store's samples as a video: the images beside their features in colours."""

import os
import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, EnvironmentFault
from pipeline.inputs.local import temporary_beside
from pipeline.viewing.samples import FeatureColours, open_dataset, spread

__all__ = ["feature_video", "save_video"]

Pixels = NDArray[np.uint8]
# The PCA, and the scale of the colours, are fitted to so many frames.
_FITTED = 64
_GAP = 8


def feature_video(url: str, prefix: str | None = None) -> tuple[int, Iterator[Pixels]]:
    """The samples of a store in the order of their keys, each with its image beside its features in colours.

    One basis and one scale of colours serve all frames: equal features have equal colours throughout.

    Args:
        url: the store.
        prefix: of their keys: those below it alone, as ``clip`` has ``clip/000000`` and on, and that of this name.

    Returns:
        How many there are, and the frames, uint8 ``[H, W, 3]``.

    Raises:
        ConfigError: there is no sample, or none whose key begins so.
    """
    dataset = open_dataset(url)
    names = open_dataset(url, [])
    keys = [names[number]["key"] for number in range(len(names))]
    below = None if prefix is None else f"{prefix.rstrip('/')}/"
    chosen = [number for number, key in enumerate(keys) if below is None or f"{key}/".startswith(below)]
    if not chosen:
        folders = sorted({key.rpartition("/")[0] for key in keys} - {""})
        raise ConfigError(
            f"{url} has no sample whose key begins with {below!r}; its keys are {', '.join(keys[:3])} ..."
            + (f", those of videos and folders begin with {', '.join(folders[:5])}" if folders else "")
        )
    numbers = sorted(chosen, key=lambda number: _in_order(keys[number]))
    colours = FeatureColours(dataset, [numbers[one] for one in spread(_FITTED, len(numbers))])
    images = open_dataset(url, ["image"])

    def frames() -> Iterator[Pixels]:
        for number in numbers:
            picture = colours(number)
            if "image" in images.arrays:
                image = images[number]["image"].numpy()
                gap = np.full((picture.shape[0], _GAP, 3), 255, np.uint8)
                picture = np.concatenate([image, gap, picture], 1)
            yield picture

    return len(numbers), frames()


def _in_order(key: str) -> list[tuple[int, str]]:
    """What sorts keys by the numbers in them, however many digits these have."""
    parts = re.split(r"(\d+)", key)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def save_video(frames: Iterator[Pixels], place: str, fps: float = 25.0) -> None:
    """Write frames uint8 ``[H, W, 3]``, all of one size, as MP4: H.264 that every player shows.

    A side of an odd number of pixels gets another row or column, the last one again, as the format has its colours at
    half the resolution. The file appears when it is whole.

    Raises:
        EnvironmentFault: PyAV is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            "videos are written by PyAV, which is not installed here; pip install 'featup-datasets[video]'"
        ) from error
    av.logging.set_level(None)
    with temporary_beside(os.path.abspath(place)) as temporary:
        with av.open(temporary, "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = None
            for pixels in frames:
                even = np.pad(pixels, [(0, side % 2) for side in pixels.shape[:2]] + [(0, 0)], "edge")
                if stream is None:
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                    stream.height, stream.width = even.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.options = {"crf": "18"}
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            if stream is not None:
                container.mux(stream.encode(None))
        os.replace(temporary, place)

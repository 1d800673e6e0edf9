"""Videos as input: their frames as samples, and a frame's pixels as the bytes of an image file."""

import atexit
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache

from pipeline.child import ATTEMPTS, ChildCrashedError, ChildProcess, ChildTimeoutError
from pipeline.errors import Reason, SampleError
from pipeline.inputs import storage
from pipeline.inputs.folder import FoundFile
from pipeline.inputs.frames import FrameQuestion, FrameTable
from pipeline.inputs.places import Place

__all__ = [
    "FRAME_EXT",
    "USUAL_LIMITS",
    "FrameLimits",
    "default_reader",
    "frame_table",
    "frames_of",
    "is_video",
    "read_frame",
]

_VIDEO_EXTS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "m2ts", "mts", "wmv", "flv", "ogv", "3gp")
FRAME_EXT = "ppm"
"""Frames are files of this type: RGB without compression, so that their bytes follow from the pixels alone."""
_FORMAT = 1
# Looking through a video's packets reads the whole file; at least so many bytes a second are expected.
_SLOWEST = 5e6
_TABLE_SECONDS = 60.0
# Where frames are counted as they are decoded, the time limit of one holds for so many.
_COUNTED = 500


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What reading a frame may take: so many pixels, and seconds for seeking and decoding."""

    max_pixels: int
    seconds: float


USUAL_LIMITS = FrameLimits(100_000_000, 60.0)
"""The defaults of the options of decoding."""


def is_video(name: str) -> bool:
    """Whether a file is a video, by its extension."""
    return name.rpartition(".")[2].lower() in _VIDEO_EXTS


def frame_table(file: FoundFile, cache_dir: str | None = None, reader: ChildProcess | None = None) -> FrameTable:
    """The frames of a video, read from its packets; nothing is decoded.

    Args:
        file: the video. A remote one is copied to this machine.
        cache_dir: where tables are kept; they are used again while a video's size and stamp stand. Those with a problem
            are not: it may have been of the machine, such as a lack of memory.
        reader: the process that reads; by default this process has one.

    Raises:
        EnvironmentFault: PyAV is not installed, or the file may not be read.
    """
    place = storage.join(cache_dir, _table_name(file.url)) if cache_dir and file.stamp else None
    if place is not None and (saved := _saved(place, file)) is not None:
        return saved
    seconds = _TABLE_SECONDS + file.size / _SLOWEST
    try:
        table: FrameTable = (reader or default_reader()).ask(storage.local_copy(file.url), seconds)
    except ChildTimeoutError:
        table = FrameTable(problem=f"takes more than {seconds:.0f} s to be looked through")
    except ChildCrashedError as error:
        table = FrameTable(problem=f"is damaged in a way that FFmpeg does not survive ({error}), or memory ran out")
    if place is not None and not table.problem:
        about = {"format": _FORMAT, "url": file.url, "size": file.size, "stamp": file.stamp, **asdict(table)}
        storage.write_atomic(place, json.dumps(about).encode())
    return table


def _table_name(url: str) -> str:
    return hashlib.sha256(os.fsencode(url)).hexdigest()[:32] + ".frames.json"


def _saved(place: str, file: FoundFile) -> FrameTable | None:
    """The table that was kept of this version of a video; None where there is none that can be read."""
    try:
        about = json.loads(storage.read_bytes(place))
        version = [about.pop(name) for name in ("format", "url", "size", "stamp")]
        if version != [_FORMAT, file.url, file.size, file.stamp]:
            return None
        table = FrameTable(**about | {"pts": None if about["pts"] is None else tuple(about["pts"])})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    # Earlier versions kept problems too.
    return None if table.problem else table


def frames_of(table: FrameTable, url: str, every: int) -> Iterator[tuple[Place, SampleError | None]]:
    """Every ``every``-th frame of a video, from its first on, with why it cannot be read (None where it may be)."""
    cut = SampleError(
        Reason.TRUNCATED,
        f"{url} ends after {table.count} of {table.count + table.lost} frames: it was cut short; copy it again",
    )
    for number in range(0, table.count + table.lost, every):
        there = number < table.count
        yield Place(url, "frame", number, table.pts[number] if table.pts and there else None), None if there else cut


def read_frame(place: Place, version: str, limits: FrameLimits, reader: ChildProcess | None = None) -> bytes:
    """A frame as the bytes of an image file (:data:`FRAME_EXT`), turned as it is displayed.

    It is decoded in a child process, which keeps the video open: frames that are asked for in order cost one decoding
    each. Colours are converted as FFmpeg does by default; pixels that are not square stay as they are.

    Args:
        place: of the frame.
        version: the file's size and stamp.
        limits: on pixels and time.
        reader: the process that decodes; by default this process has one.

    Raises:
        SampleError: ``UNDECODABLE`` (damaged, or made from damaged frames), ``TOO_LARGE``, ``DECODE_TIMEOUT``.
        EnvironmentFault: PyAV is not installed, or the child process cannot be started.
    """
    seconds = limits.seconds * (1 if place.pts is not None else 1 + place.number // _COUNTED)
    question = FrameQuestion(storage.local_copy(place.file), version, place, limits.max_pixels)
    try:
        data: bytes = (reader or default_reader()).ask(question, seconds)
    except ChildTimeoutError as error:
        raise SampleError(
            Reason.DECODE_TIMEOUT,
            f"decoding frame {place.number} of {place.file} takes longer than decode_timeout = {limits.seconds:g} s; "
            "raise decode_timeout, or encode the video with more keyframes",
        ) from error
    except ChildCrashedError as error:
        raise SampleError(
            Reason.UNDECODABLE,
            f"FFmpeg crashed {ATTEMPTS} times on frame {place.number} of {place.file}, its process ended with {error}: "
            "the file is damaged, or memory ran out; encode the video again, or lower max_pixels",
        ) from error
    return data


def default_reader() -> ChildProcess:
    """The child process that reads the videos of this process."""
    return _reader(os.getpid())


@lru_cache(maxsize=1)
def _reader(process: int) -> ChildProcess:
    """The number of this process is the argument because a forked process needs a reader of its own."""
    reader = ChildProcess("pipeline.inputs.video_worker", "video")
    atexit.register(reader.close)
    return reader

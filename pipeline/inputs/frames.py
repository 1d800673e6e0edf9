"""Videos by PyAV: which frames a video has, and the pixels of a frame.

Frames are numbered from 0 in the order in which they are shown. Which there are is read from the packets; nothing is
decoded. A frame is found by its time stamp: decoding begins at the keyframe before it, and goes on from frame to frame
as long as these are asked for in order. What follows damage is not used until the next keyframe, as the frames in
between are made from what was damaged.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from pipeline.errors import EnvironmentFault, Reason, SampleError
from pipeline.inputs.places import Place

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["FrameQuestion", "FrameTable", "read_ppm", "read_table"]

# A playlist under a video's name would have FFmpeg open what it names.
_CONTAINER = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,asf,flv,ogg",
}
# Where no keyframe lies before a frame as the container's index tells, decoding begins so many seconds earlier.
_EARLIER = (0.0, 2.0, 20.0)
# Nearer frames are decoded one after the other: an index is of the order stored, and may name the wrong keyframe.
_FAR = 8


@dataclass(frozen=True)
class FrameTable:
    """The frames of a video.

    Attributes:
        count: how many there are.
        pts: their times in the order shown, in units of the stream; None where the container does not tell them (AVI
            with frames that are stored in another order than shown), so that frames are counted as they are decoded.
        lost: how many more the container announces: the file was cut short.
        problem: why it has no frames that can be read; empty where it has.
        pictures: whether it has a stream of pictures at all.
    """

    count: int = 0
    pts: tuple[int, ...] | None = None
    lost: int = 0
    problem: str = ""
    pictures: bool = True


@dataclass(frozen=True)
class FrameQuestion:
    """Which frame of a local file is asked for, which version of it, and how many pixels it may have."""

    path: str
    version: str
    place: Place
    max_pixels: int


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            "videos are read by PyAV, which is not installed here; pip install 'featup-datasets[video]'"
        ) from error
    av.logging.set_level(None)
    return av


def _open(path: str) -> "tuple[InputContainer, VideoStream | None]":
    container = _pyav().open(path, metadata_errors="replace", container_options=_CONTAINER)
    # A cover is a picture beside the sound, and no video.
    streams = [stream for stream in container.streams.video if not stream.disposition & stream.disposition.attached_pic]
    return container, streams[0] if streams else None


def read_table(path: str) -> FrameTable:
    """The frames of a video, from its packets."""
    av = _pyav()
    try:
        container, stream = _open(path)
    except av.FFmpegError as error:
        return FrameTable(problem=f"cannot be opened ({_text(error)})")
    with container:
        if stream is None:
            return FrameTable(problem="has no pictures", pictures=False)
        packets, times, keyframes, reached = 0, [], 0, 0
        avi = "avi" in container.format.name
        # Damage ends it: what lies behind is counted below, where the container tells how much it is.
        with suppress(av.FFmpegError):
            for packet in container.demux(stream):
                if packet.size:
                    packets += 1
                    keyframes += packet.is_keyframe
                    # AVI counts ticks, also those at which the frame before stays.
                    reached = packets if not avi or packet.dts is None else max(reached, packet.dts + 1)
                    if not packet.is_discard:
                        times.append(packet.pts)
        lost = max(0, stream.frames - reached)
        if not times or not keyframes:
            return FrameTable(lost=lost, problem="has no frame that can be decoded")
        reorders = avi and stream.codec_context.has_b_frames
        known = [time for time in times if time is not None]
        if len(set(known)) < len(times) or (reorders and all(before < after for before, after in pairwise(known))):
            return FrameTable(len(times), None, lost)
        return FrameTable(len(times), tuple(sorted(known)), lost)


_Decoded: TypeAlias = "tuple[int, VideoFrame | None]"


class _Video:
    """An open video that goes on from the frame that was read last.

    The decoder stops at what is damaged, which it would conceal otherwise. The frame that it was about to give is lost
    with that, so that frames that lack are looked for by a second one: it conceals, and is told what is damaged.
    """

    def __init__(self, question: FrameQuestion, damaged: set[int] | None = None) -> None:
        """
        Args:
            question: names the file.
            damaged: times of packets that are; None: these are found.
        """
        self.question = question
        self.strict = damaged is None
        self.damaged: set[int] = set() if damaged is None else damaged
        self.concealing: _Video | None = None
        self.container: InputContainer | None = None
        self.by_pts = question.place.pts is not None
        self._rewind()

    def close(self) -> None:
        if self.container is not None:
            self.container.close()
        if self.concealing is not None:
            self.concealing.close()
            self.concealing = None

    def _rewind(self) -> None:
        self.close()
        av = _pyav()
        try:
            self.container, stream = _open(self.question.path)
        except av.FFmpegError as error:
            raise self._damaged(f"the video cannot be opened ({_text(error)})") from error
        if stream is None:
            raise self._damaged("the video has no pictures")
        self.stream = stream
        context = stream.codec_context
        # One thread: each process that loads has one core, and errors come with the packet that has them.
        context.thread_count = 1
        context.options = {"max_pixels": str(self.question.max_pixels)} | (
            {"err_detect": "explode"} if self.strict else {}
        )
        # Each frame carries whether it can be trusted.
        context.flags |= av.codec.context.Flags.copy_opaque
        self.frames = self._decode(None)
        # The keyframe that decoding began with, where an error may come from beginning there.
        self.doubtful: int | None = None
        self.passed: int | None = None
        self.ahead: _Decoded | None = None

    def _decode(self, until: int | None) -> "Iterator[_Decoded]":
        """Frames as they are shown, each with its time, or its number where times are not known; None: damaged.

        Args:
            until: nothing comes where the first keyframe lies behind this time; None: decoding begins at the start.
        """
        av = _pyav()
        assert self.container is not None
        numbers = count()
        first: int | None = None
        began: int | None = None
        sound = linked = False
        self.doubtful = None
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                return
            if packet is None:
                return
            if packet.is_keyframe and packet.size:
                if first is None and until is not None:
                    if packet.pts is None or packet.pts > until:
                        return
                    began = packet.pts
                elif first is not None:
                    began = None
                linked = False
                if not sound:
                    first, sound = packet.pts, True
            # Frames before the keyframe that decoding began with are made from frames that were not decoded.
            leading = self.by_pts and packet.size and first is not None and (packet.pts or 0) < first
            linked = linked or bool(leading)
            sound = sound and not packet.is_corrupt and (self.strict or packet.pts not in self.damaged)
            # A list of its own for each packet: PyAV finds what a frame carries by the object's identity.
            packet.opaque = [sound and not leading]
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if not leading:
                    # Up to the second keyframe it may be that frames before the first are missed, not damage; so it may
                    # be behind damage, where frames before the keyframe link its group with the one before.
                    sound, self.doubtful = False, self.doubtful if began is None else began
                    if began is None and not linked and packet.pts is not None:
                        self.damaged.add(packet.pts)
                    if not self.by_pts:
                        return
                continue
            for frame in frames:
                trusted = frame.opaque == [True] and not frame.is_corrupt
                if not self.by_pts:
                    yield next(numbers), frame if trusted else None
                elif frame.pts is not None:
                    yield frame.pts, frame if trusted else None

    def frame(self, place: Place) -> "VideoFrame":
        """The frame at a place; SampleError where it is damaged."""
        try:
            return self._frame(place)
        except SampleError:
            if not (self.strict and self.by_pts and self.damaged):
                raise
            self.concealing = self.concealing or _Video(self.question, self.damaged)
            self.concealing.question = self.question
            return self.concealing.frame(place)

    def _frame(self, place: Place) -> "VideoFrame":
        wanted = place.number if place.pts is None else place.pts
        if self.passed is not None and wanted <= self.passed:
            self._rewind()
        if self.by_pts and self._is_far(wanted):
            self._seek(wanted, wanted)
        while True:
            at, frame = self.ahead or next(self.frames, (None, None))
            if at is not None and at < wanted:
                self.ahead = None
            elif at == wanted and frame is not None:
                self.passed, self.ahead = wanted, None
                return frame
            elif self.doubtful is not None:
                self._seek(wanted, self.doubtful - 1)
            else:
                self.passed, self.ahead = wanted, (at, frame) if at is not None and at > wanted else None
                if at is None:
                    raise self._damaged("the video ends before it, or cannot be decoded any more")
                raise self._damaged("it, or a frame that it is made from, is damaged")

    def _is_far(self, wanted: int) -> bool:
        """Whether frames can be left out before the one that is wanted, as a keyframe lies before it."""
        if self.passed is None:
            return True
        stream = self.stream
        apart = (wanted - self.passed) * float((stream.time_base or 0) * (stream.average_rate or 0))
        if apart < _FAR:
            return False
        entries = stream.index_entries
        found = entries.search_timestamp(wanted) if len(entries) else -1
        return found >= 0 and entries[found].timestamp > (self.ahead[0] if self.ahead else self.passed)

    def _seek(self, wanted: int, latest: int) -> None:
        """Go to the last keyframe until ``latest``; where the index misleads, further back, at last to the start."""
        av = _pyav()
        base = self.stream.time_base
        assert self.container is not None
        assert base is not None
        for seconds in _EARLIER:
            try:
                self.container.seek(latest - int(seconds / base), stream=self.stream)
            except av.FFmpegError:
                break
            frames = self._decode(latest)
            first = next(frames, None)
            while first is not None and first[1] is None and first[0] < wanted:
                first = next(frames, None)
            if first is not None and first[0] <= wanted:
                self.frames, self.ahead = frames, first
                return
        self._rewind()

    def _damaged(self, what: str) -> SampleError:
        return SampleError(
            Reason.UNDECODABLE,
            f"frame {self.question.place.number} of {self.question.place.file} cannot be read: {what}; copy or encode "
            "the video again",
        )


def _text(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


_opened: dict[tuple[str, str, int, bool], _Video] = {}


def read_ppm(question: FrameQuestion) -> bytes:
    """A frame as the bytes of a PPM file, turned as it is displayed.

    Raises:
        SampleError: it cannot be decoded, or has too many pixels.
    """
    place = question.place
    key = (question.path, question.version, question.max_pixels, place.pts is None)
    video = _opened.get(key)
    if video is None:
        for other in _opened.values():
            other.close()
        _opened.clear()
        video = _opened[key] = _Video(question)
    video.question = question
    context = video.stream.codec_context
    _check_pixels(context.height, context.width, question)
    return _ppm(video.frame(place), question)


def _check_pixels(height: int, width: int, question: FrameQuestion) -> None:
    if height * width > question.max_pixels:
        raise SampleError(
            Reason.TOO_LARGE,
            f"(height, width) = ({height}, {width}) is {height * width} pixels, more than max_pixels = "
            f"{question.max_pixels}; raise max_pixels if such videos are meant to be in the data",
        )


def _ppm(frame: "VideoFrame", question: FrameQuestion) -> bytes:
    import numpy as np
    from av.video.reformatter import Interpolation

    _check_pixels(frame.height, frame.width, question)
    # The same bytes on every machine, whatever instructions it has.
    exact = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    pixels = frame.reformat(format="rgb24", interpolation=exact, threads=1).to_ndarray()
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        # (x, y) is displayed at (a x + c y, b x + d y), in whole quarter turns and flips.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        turned = abs(b) > abs(a)
        pixels = pixels.transpose(1, 0, 2) if turned else pixels
        pixels = pixels[:: -1 if (b if turned else d) < 0 else 1, :: -1 if (c if turned else a) < 0 else 1]
    height, width = pixels.shape[:2]
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()

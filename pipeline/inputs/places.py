"""Samples within a file that holds many: frames of a video, rows of a table."""

import re
import zlib
from dataclasses import dataclass
from typing import Literal

from pipeline.inputs.tar import Member

__all__ = ["Place", "file_mark", "place_of"]

_FORM = re.compile(
    r"(?P<file>.+)#(?P<kind>frame|row)=(?P<number>\d+)(?:&pts=(?P<pts>-?\d+))?(?:&column=(?P<column>.+))?", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Place:
    """A frame of a video or a cell of a table, written as the file's URL with a fragment.

    ``clip.mp4#frame=12&pts=6144`` is the frame that is shown as number 12 (from 0), at that time in the units of the
    video's stream; without ``pts`` frames are counted as they are decoded. ``data.parquet#row=12&column=image`` is a
    cell.
    """

    file: str
    kind: Literal["frame", "row"]
    number: int
    pts: int | None = None
    column: str = ""

    def __str__(self) -> str:
        pts = "" if self.pts is None else f"&pts={self.pts}"
        column = f"&column={self.column}" if self.column else ""
        return f"{self.file}#{self.kind}={self.number}{pts}{column}"

    @staticmethod
    def parse(url: str) -> "Place | None":
        """The place that a text names; None where it names none. Files may be called alike: see :func:`place_of`."""
        match = _FORM.fullmatch(url)
        if match is None:
            return None
        kind: Literal["frame", "row"] = "frame" if match["kind"] == "frame" else "row"
        pts = None if match["pts"] is None else int(match["pts"])
        return Place(match["file"], kind, int(match["number"]), pts, match["column"] or "")


def place_of(member: Member, kind: Literal["frame", "row"] | None = None) -> Place | None:
    """Where a member lies within a file that holds many; None where it is a file of its own, or lies in a tar.

    With a ``kind``, None also where it is of the other one. The mark decides, which only parts of files have: a file
    may be called ``a#row=1&column=b.jpg``.
    """
    place = Place.parse(member.url) if member.url and member.mark else None
    return place if place is None or kind in (None, place.kind) else None


def file_mark(size: int) -> int:
    """What stands for a file's size, in bytes, in each of the members that lie in it; never 0, as files have."""
    return zlib.crc32(str(size).encode()) or 1

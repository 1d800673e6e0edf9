"""Samples within a file that holds many: frames of a video, rows of a table."""

import re
import zlib
from dataclasses import dataclass
from typing import Literal

__all__ = ["Place", "file_mark"]

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
        """The place that a member's URL names; None where it is a file of its own."""
        match = _FORM.fullmatch(url)
        if match is None:
            return None
        kind: Literal["frame", "row"] = "frame" if match["kind"] == "frame" else "row"
        pts = None if match["pts"] is None else int(match["pts"])
        return Place(match["file"], kind, int(match["number"]), pts, match["column"] or "")


def file_mark(size: int) -> int:
    """What stands for a file's size, in bytes, in each of the members that lie in it."""
    return zlib.crc32(str(size).encode())

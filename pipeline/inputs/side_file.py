"""Side files that list where a tar's members lie: the index of NVIDIA DALI (``wds2idx``)."""

import logging

from pipeline.errors import EnvironmentFault
from pipeline.inputs import storage
from pipeline.inputs.tar_window import padded

__all__ = ["header_ranges", "parse_dali_index"]


logger = logging.getLogger(__name__)
_VERSION = "v1.2"
# More than headers and their extensions between two members need.
_LONGEST_HEADERS = 64 << 10
# Reading through a member of this size takes no longer than another request.
_SMALL_MEMBER = 32 << 10


def header_ranges(url: str, size: int) -> list[tuple[int, int]]:
    """Byte ranges of a tar that should hold its headers, by the ``.idx`` file beside it; [] where there is none.

    Nothing is believed: the headers themselves are read, by many requests at once instead of one after the other.
    """
    if "?" in url or not url.endswith(".tar"):
        return []  # a signature is of the tar alone
    place = url.removesuffix(".tar") + ".idx"
    try:
        members = parse_dali_index(storage.read_bytes(place).decode())
    except FileNotFoundError:
        return []
    except (EnvironmentFault, OSError, ValueError) as error:
        logger.info("%s is not used: %s", place, error)
        return []
    ranges: list[tuple[int, int]] = []
    end = 0
    for offset, length in sorted(members):
        if end < offset <= size and offset - end <= _LONGEST_HEADERS:
            if ranges and end - ranges[-1][1] <= _SMALL_MEMBER:
                ranges[-1] = (ranges[-1][0], offset)
            else:
                ranges.append((end, offset))
        end = offset + padded(length)
    return ranges


def parse_dali_index(text: str) -> list[tuple[int, int]]:
    """(offset of the data, size) of every member that a DALI index of version 1.2 lists.

    Its first line is ``v1.2 SAMPLES``; each further one is a sample: ``EXTENSION OFFSET SIZE NAME`` for each member.

    Raises:
        ValueError: another version, or lines that are of another form (a name with blanks in it, say).
    """
    head, *lines = text.splitlines() or [""]
    version, _, count = head.partition(" ")
    if version != _VERSION or not count.strip().isdecimal():
        raise ValueError(f"its first line is {head[:40]!r}, wanted '{_VERSION} NUMBER'")
    if len(lines) != int(count):
        raise ValueError(f"it lists {len(lines)} samples, and its first line says {int(count)}")
    members = []
    for number, line in enumerate(lines, 2):
        words = line.split()
        if len(words) % 4 or not words:
            raise ValueError(f"line {number} is not of the form 'EXTENSION OFFSET SIZE NAME' for each member")
        for offset, size in zip(words[1::4], words[2::4], strict=True):
            if not (offset.isdecimal() and size.isdecimal()):
                raise ValueError(f"line {number} gives {offset!r} and {size!r} as an offset and a size")
            members.append((int(offset), int(size)))
    return members

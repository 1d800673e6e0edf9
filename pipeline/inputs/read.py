"""Samples of an indexed tar, by byte range."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import TypeAlias

from pipeline.errors import InputChangedError, InputError, SampleError
from pipeline.inputs import storage
from pipeline.inputs.storage import RangeReader
from pipeline.inputs.tar import BLOCK, Member, ShardIndex, header_mark

__all__ = ["INLINE", "Sample", "read_samples"]


Sample: TypeAlias = dict[str, bytes]
"""The bytes of a sample's members, by extension."""
# Reading through a gap of this length takes about as long as another request.
_GAP = 1 << 20
_REQUEST = 64 << 20
_PARALLEL_FILES = 16
INLINE = "data:,"
"""Begins the URL of a member whose content stands in the URL."""


@dataclass(slots=True)
class _Request:
    """A byte range and the members in it, each with the sample that it belongs to."""

    start: int
    stop: int
    members: list[tuple[Sample, Member]] = field(default_factory=list)


def read_samples(
    index: ShardIndex,
    start: int,
    stop: int,
    wanted: Callable[[str], bool] | None = None,
    *,
    read: RangeReader = storage.read_range,
) -> list[Sample | SampleError]:
    """Samples ``start`` to ``stop`` of an index, in order.

    Members that lie close together come by one request, of at most 64 MiB (a larger member by several). A
    request that fails is made again. The header before each member is compared with the one that was indexed.

    Args:
        index: of the tar to read.
        start: position of the first sample.
        stop: position behind the last sample.
        wanted: whether members of an extension (lower case) are to be read; all are where it is None.
        read: reads byte ranges.

    Returns:
        For each sample the bytes of its wanted members by extension, in the order of the tar, or, where the
        index has a problem with it, that problem as a SampleError; nothing is read for those.

    Raises:
        InputChangedError: the tar is not the one that was indexed.
        InputError: the index has no such samples.
        OSError: it cannot be read, after retries.
    """
    if not 0 <= start <= stop <= len(index.samples):
        raise InputError(
            f"samples {start} to {stop} of {index.url} are asked for, and its index holds "
            f"{len(index.samples)}: the plan was made from another version of the tar; run the job again, "
            "so that it is made anew"
        )
    samples: list[Sample | SampleError] = []
    pairs: list[tuple[Sample, Member]] = []
    for entry in index.samples[start:stop]:
        if entry.problem is not None:
            samples.append(SampleError(*entry.problem))
            continue
        members = [member for member in entry.members if wanted is None or wanted(member.ext)]
        sample: Sample = dict.fromkeys((member.ext for member in members), b"")
        samples.append(sample)
        pairs.extend((sample, member) for member in members)
    files = [(sample, member) for sample, member in pairs if member.url]
    if files:
        _read_files(files, read)
    for request in _requests([pair for pair in pairs if not pair[1].url]):
        _serve(index.url, request, read)
    return samples


def _read_files(files: list[tuple[Sample, Member]], read: RangeReader) -> None:
    """Read members that are files of their own, remote ones side by side."""
    members = [member for _, member in files]
    if all(storage.is_local(member.url) for member in members):
        contents = [_read_file(member, read) for member in members]
    else:
        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            contents = list(pool.map(_read_file, members, repeat(read)))
    for (sample, member), data in zip(files, contents, strict=True):
        sample[member.ext] = data


def _read_file(member: Member, read: RangeReader) -> bytes:
    if member.url.startswith(INLINE):
        return member.url.removeprefix(INLINE).encode()
    data = storage.fetch(member.url, 0, member.size, read)
    # Looked up after it was read: a file that was rewritten before or meanwhile has another stamp by then.
    state = storage.stat(member.url)
    if (state.size, state.stamp) != (member.size, member.stamp):
        raise InputChangedError(
            f"{member.url} changed since it was listed ({state.size} bytes now, {member.size} then; stamp "
            f"{state.stamp} now, {member.stamp} then). Run the same command again, which lists it anew and compares "
            "the bytes of finished samples"
        )
    return data


def _requests(pairs: list[tuple[Sample, Member]]) -> list[_Request]:
    requests: list[_Request] = []
    # A hard link has the data of an earlier member, so members need not ascend.
    for sample, member in sorted(pairs, key=lambda pair: pair[1].offset):
        start, stop = member.offset - BLOCK, member.offset + member.size
        if not requests or start - requests[-1].stop > _GAP or stop - requests[-1].start > _REQUEST:
            requests.append(_Request(start, stop))
        requests[-1].stop = max(requests[-1].stop, stop)
        requests[-1].members.append((sample, member))
    return requests


def _serve(url: str, request: _Request, read: RangeReader) -> None:
    bounds = [*range(request.start, request.stop, _REQUEST), request.stop]
    pieces = [storage.fetch(url, start, stop, read) for start, stop in pairwise(bounds)]
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    for sample, member in request.members:
        at = member.offset - request.start
        if header_mark(data[at - BLOCK : at]) != member.mark:
            raise InputChangedError(
                f"{url}: the header of a .{member.ext} member at byte {member.offset - BLOCK} is not the "
                "one that was indexed: the tar was replaced. Run the job again, so that its plan is made "
                "from the file as it is now"
            )
        sample[member.ext] = data[at : at + member.size]

"""Samples of an indexed tar, by byte range."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from pipeline.errors import InputError, SampleError
from pipeline.inputs import storage
from pipeline.inputs.storage import RangeReader
from pipeline.inputs.tar import BLOCK, Member, ShardIndex, header_mark, index_tar

__all__ = ["Sample", "iterate_tar", "read_samples"]


Sample: TypeAlias = dict[str, bytes]
"""The bytes of a sample's members, by extension."""
# Reading through a gap of this length takes about as long as another request.
_GAP = 1 << 20
_REQUEST = 64 << 20


@dataclass(slots=True)
class _Request:
    """A byte range and the members in it, each with the sample that it belongs to."""

    start: int
    stop: int
    wanted: list[tuple[Sample, Member]] = field(default_factory=list)


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
        InputError: the tar is not the one that was indexed, or the index has no such samples.
        OSError: it cannot be read, after retries.
    """
    if not 0 <= start <= stop <= len(index.samples):
        raise InputError(
            f"samples {start} to {stop} of {index.url} are asked for, and its index holds "
            f"{len(index.samples)}: the plan was made from another version of the tar; run the job again, "
            "so that it is made anew"
        )
    samples: list[Sample | SampleError] = []
    requests: list[_Request] = []
    for entry in index.samples[start:stop]:
        if entry.problem is not None:
            samples.append(SampleError(*entry.problem))
            continue
        sample: Sample = {}
        samples.append(sample)
        for member in entry.members:
            if wanted is None or wanted(member.ext):
                _add(requests, sample, member)
    for request in requests:
        _serve(index.url, request, read)
    return samples


def _add(requests: list[_Request], sample: Sample, member: Member) -> None:
    start, stop = member.offset - BLOCK, member.offset + member.size
    last = requests[-1] if requests else None
    if last is None or start - last.stop > _GAP or stop - last.start > _REQUEST:
        last = _Request(start, stop)
        requests.append(last)
    last.stop = stop
    last.wanted.append((sample, member))


def _serve(url: str, request: _Request, read: RangeReader) -> None:
    bounds = [*range(request.start, request.stop, _REQUEST), request.stop]
    pieces = [storage.fetch(url, start, stop, read) for start, stop in pairwise(bounds)]
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    for sample, member in request.wanted:
        at = member.offset - request.start
        if header_mark(data[at - BLOCK : at]) != member.mark:
            raise InputError(
                f"{url}: the header of a .{member.ext} member at byte {member.offset - BLOCK} is not the "
                "one that was indexed: the tar was replaced. Run the job again, so that its plan is made "
                "from the file as it is now"
            )
        sample[member.ext] = data[at : at + member.size]


def iterate_tar(url: str, *, read: RangeReader = storage.read_range) -> Iterator[tuple[str, Sample]]:
    """Key and members (bytes by extension) of every sample of a tar that can be read, in order.

    For tests and small tools. Samples with a problem are left out: `index_tar` lists them, and the tar's
    faults.

    Raises:
        InputError: there is no such tar.
    """
    index = index_tar(url, read=read)
    if index.size < 0:
        raise InputError(f"{url} does not exist; check its name")
    for position, entry in enumerate(index.samples):
        for sample in read_samples(index, position, position + 1, read=read):
            if isinstance(sample, dict):
                yield entry.key, sample

"""Samples of an indexed tar, by byte range; of a manifest, from files, videos and tables."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, pairwise, repeat
from typing import TypeAlias

from pipeline.child import ChildCrashedError, ChildTimeoutError
from pipeline.errors import InputChangedError, InputError, Reason, SampleError
from pipeline.inputs import storage
from pipeline.inputs.places import Place, file_mark, place_of
from pipeline.inputs.storage import FileStat, RangeReader
from pipeline.inputs.table_rows import read_cell
from pipeline.inputs.tar import BLOCK, IndexedSample, Member, ShardIndex, header_mark
from pipeline.inputs.video import USUAL_LIMITS, FrameLimits, read_frame

__all__ = ["INLINE", "Sample", "iter_samples", "read_samples"]


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
    limits: FrameLimits = USUAL_LIMITS,
) -> list[Sample | SampleError]:
    """Samples ``start`` to ``stop`` of an index, in order: all that :func:`iter_samples` gives."""
    return list(iter_samples(index, start, stop, wanted, read=read, limits=limits))


def iter_samples(
    index: ShardIndex,
    start: int,
    stop: int,
    wanted: Callable[[str], bool] | None = None,
    *,
    read: RangeReader = storage.read_range,
    limits: FrameLimits = USUAL_LIMITS,
) -> Iterator[Sample | SampleError]:
    """Samples ``start`` to ``stop`` of an index, in order.

    Members that lie close together come by one request, of at most 64 MiB (a larger member by several). A
    request that fails is made again. The header before each member is compared with the one that was indexed. Frames
    of videos, which are large, are decoded one by one as they are taken.

    Args:
        index: of the tar to read.
        start: position of the first sample.
        stop: position behind the last sample.
        wanted: whether members of an extension (lower case) are to be read; all are where it is None.
        read: reads byte ranges.
        limits: of reading a frame.

    Yields:
        For each sample the bytes of its wanted members by extension, in the order of the tar, or, where the
        index has a problem with it, that problem as a SampleError; nothing is read for those. Also a frame that
        cannot be decoded is a SampleError.

    Raises:
        InputChangedError: the tar, or another file, is not the one that was indexed.
        InputError: the index has no such samples.
        EnvironmentFault: it may not be read, or what reads videos is not installed.
        OSError: it cannot be read, after retries.
    """
    if not 0 <= start <= stop <= len(index.samples):
        raise InputError(
            f"samples {start} to {stop} of {index.url} are asked for, and its index holds "
            f"{len(index.samples)}: the plan was made from another version of the tar; run the job again, "
            "so that it is made anew"
        )
    # A video that hung or crashed its reader would do so for each of its frames.
    given_up: dict[str, SampleError] = {}
    for one_by_one, run in groupby(index.samples[start:stop], _has_frames):
        for entries in ([entry] for entry in run) if one_by_one else [list(run)]:
            yield from _read(index.url, entries, wanted, read, limits, given_up)


def _has_frames(entry: IndexedSample) -> bool:
    return any(place_of(member, "frame") for member in entry.members)


def _read(
    url: str,
    entries: Sequence[IndexedSample],
    wanted: Callable[[str], bool] | None,
    read: RangeReader,
    limits: FrameLimits,
    given_up: dict[str, SampleError],
) -> list[Sample | SampleError]:
    samples: list[Sample | SampleError] = []
    pairs: list[tuple[Sample, Member]] = []
    for entry in entries:
        if entry.problem is not None:
            samples.append(SampleError(*entry.problem))
            continue
        members = [member for member in entry.members if wanted is None or wanted(member.ext)]
        sample: Sample = dict.fromkeys((member.ext for member in members), b"")
        samples.append(sample)
        pairs.extend((sample, member) for member in members)
    parts = {id(member): place for _, member in pairs if (place := place_of(member))}
    _read_files([pair for pair in pairs if pair[1].url and id(pair[1]) not in parts], read)
    errors = _read_parts(
        [(sample, member, parts[id(member)]) for sample, member in pairs if id(member) in parts], limits, given_up
    )
    for request in _requests([pair for pair in pairs if not pair[1].url]):
        _serve(url, request, read)
    return [errors.get(id(sample), sample) for sample in samples]


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
        raise _changed(member.url, member.stamp, state, f"{member.size} then")
    return data


def _read_parts(
    parts: list[tuple[Sample, Member, Place]], limits: FrameLimits, given_up: dict[str, SampleError]
) -> dict[int, SampleError]:
    """Read members that lie in videos and tables. Returns the errors, by the id of the sample."""
    errors: dict[int, SampleError] = {}
    columns: dict[str, set[str]] = {}
    for _, _, place in parts:
        columns.setdefault(place.file, set()).add(place.column)
    for sample, member, place in parts:
        try:
            if place.kind == "frame":
                if place.file in given_up:
                    raise given_up[place.file]
                data = read_frame(place, f"{member.mark} {member.stamp}", limits)
            else:
                data = _cell(place, member, columns[place.file])
            sample[member.ext] = data
        except SampleError as error:
            errors[id(sample)] = error
            if isinstance(error.__cause__, (ChildTimeoutError, ChildCrashedError)):
                given_up[place.file] = error
    # Looked up after they were read, like files.
    for _, member, place in {place.file: (sample, member, place) for sample, member, place in parts}.values():
        state = storage.stat(place.file)
        if (file_mark(state.size), state.stamp) != (member.mark, member.stamp):
            raise _changed(place.file, member.stamp, state, "another then, or the same")
    return errors


def _cell(place: Place, member: Member, columns: Collection[str]) -> bytes:
    data = read_cell(place, f"{member.mark} {member.stamp}", columns)
    if data is None:
        raise SampleError(Reason.IMAGE_MISSING, f"row {place.number} of {place.file} has no {place.column}")
    return data


def _changed(url: str, stamp: str, state: FileStat, size_then: str) -> InputChangedError:
    return InputChangedError(
        f"{url} changed since it was listed ({state.size} bytes now, {size_then}; stamp {state.stamp} now, {stamp} "
        "then). Run the same command again, which lists it anew and compares the bytes of finished samples"
    )


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

"""Reads a tar forward, so that few requests bring the headers and few bytes of the data between them."""

import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pipeline.inputs import storage
from pipeline.inputs.storage import RangeReader

__all__ = ["BLOCK", "Window", "padded"]


BLOCK = tarfile.BLOCKSIZE
# One local read holds the headers of a few small neighbours.
_LOCAL_STEP = 4 << 10
# Behind a jump a remote read holds a header with its extensions and a few small members. Where members turn out to be
# small (the next header is nearer than a request's latency is worth), reads grow to many members a request.
_REMOTE_STEPS = (32 << 10, 32 << 10, 256 << 10, 2 << 20, 8 << 20)
_JUMP = 256 << 10
_SEARCH_STEP = 1 << 20
_PARALLEL = 16
_HINTS_AHEAD = 256


def padded(size: int) -> int:
    """Bytes that a member's data take: whole blocks."""
    return -(-size // BLOCK) * BLOCK


class Window:
    """A file read forward in steps.

    Args:
        url: the file.
        size: its size in bytes.
        read: reads byte ranges.
        hints: asked once, when members turn out to be large: byte ranges in which headers are expected, ascending.
            They are read in parallel before the scan comes there. Wrong ones cost time and change nothing.
    """

    def __init__(
        self, url: str, size: int, read: RangeReader, hints: Callable[[], list[tuple[int, int]]] | None = None
    ) -> None:
        self.url = url
        self.size = size
        self._read = read
        self._local = storage.is_local(url)
        self._ask_hints = hints
        self._hints: dict[int, int] = {}
        self._hint_starts: list[int] = []
        self._prefetched: dict[int, bytes] = {}
        self._small_gaps = 0
        self._start = 0
        self._data = b""

    def at(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``, fewer at the end of the file."""
        stop = min(offset + count, self.size)
        if stop <= offset:
            return b""
        if offset < self._start or stop > self._start + len(self._data):
            self._start, self._data = offset, self._fetch(offset, stop)
        return self._data[offset - self._start : stop - self._start]

    def _fetch(self, offset: int, stop: int) -> bytes:
        if self._local:
            step = _LOCAL_STEP
        else:
            gap = offset - (self._start + len(self._data))
            self._small_gaps = self._small_gaps + 1 if gap < _JUMP else 0
            if self._small_gaps == 0 and self._ask_hints is not None:
                ranges, self._ask_hints = self._ask_hints(), None
                self._hints = dict(ranges)
                self._hint_starts = [start for start, _ in reversed(ranges)]
            expected = self._expected(offset)
            if len(expected) >= stop - offset:
                return expected
            step = _REMOTE_STEPS[min(self._small_gaps, len(_REMOTE_STEPS) - 1)]
        ahead = min(max(stop, offset + step), self.size)
        return storage.fetch(self.url, offset, ahead, self._read)

    def _expected(self, offset: int) -> bytes:
        """The bytes of the hint that begins at ``offset``; the next ones are read with it. b'' where there is none."""
        if offset in self._hints and offset not in self._prefetched:
            while self._hint_starts and self._hint_starts[-1] < offset:
                self._hint_starts.pop()
            starts = self._hint_starts[: -_HINTS_AHEAD - 1 : -1]
            with ThreadPoolExecutor(_PARALLEL) as pool:
                pieces = pool.map(lambda start: storage.fetch(self.url, start, self._hints[start], self._read), starts)
                self._prefetched = dict(zip(starts, pieces, strict=True))
        return self._prefetched.get(offset, b"")

    def skip_zeros(self, offset: int) -> int:
        """The first block from ``offset`` (a block boundary) that is not all zero, or the file's size."""
        for start in range(offset, self.size, _SEARCH_STEP):
            data = self.at(start, _SEARCH_STEP)
            zeros = len(data) - len(data.lstrip(b"\0"))
            if zeros < len(data):
                return start + zeros // BLOCK * BLOCK
        return self.size

    def find(self, offset: int, is_header: Callable[[bytes], bool]) -> int:
        """The first header from ``offset`` (a block boundary) that is valid beyond doubt, or the file's size.

        Only headers with the ustar magic count (every format since 1988): a checksum alone is met by chance.
        A tar inside a member whose own header is lost is taken for a part of this one.
        """
        for start in range(offset, self.size, _SEARCH_STEP):
            data = self.at(start, _SEARCH_STEP)
            magic = data.find(b"ustar")
            while magic >= 0:
                block = magic - 257
                if block >= 0 and block % BLOCK == 0 and is_header(data[block : block + BLOCK]):
                    return start + block
                magic = data.find(b"ustar", magic + 1)
        return self.size

import re
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.inputs import storage
from pipeline.inputs.side_file import header_ranges, parse_dali_index
from pipeline.inputs.tar import index_tar
from tests.pipeline.inputs.tars import (
    FORMATS,
    index_bytes,
    members_of,
    tar_bytes,
    three,
)


def test_a_remote_tar_is_read_in_few_large_requests() -> None:
    url = "memory://test_tarindex/remote.tar"
    files = [(f"{i:04d}.jpg", bytes([i % 251]) * 100_000) for i in range(120)]
    data = tar_bytes(files)
    storage.write_atomic(url, data)
    requests: list[int] = []

    def read(name: str, start: int, stop: int) -> bytes:
        requests.append(stop - start)
        return storage.read_range(name, start, stop)

    index = index_tar(url, read=read)
    assert [s.members[0].offset for s in index.samples] == [info.offset_data for info in members_of(data)]
    assert len(requests) <= 5
    assert index.faults == ()
    assert index.stamp


def test_a_local_tar_is_not_read_but_for_its_headers(tmp_path: Path) -> None:
    path = tmp_path / "local.tar"
    path.write_bytes(tar_bytes([(f"{i:04d}.jpg", bytes(100_000)) for i in range(100)]))
    read: list[int] = []

    def counting(name: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return storage.read_range(name, start, stop)

    index_tar(str(path), read=counting)
    assert sum(read) < path.stat().st_size / 20


def test_indexing_goes_on_after_errors_that_pass(tmp_path: Path) -> None:
    path = tmp_path / "flaky.tar"
    path.write_bytes(tar_bytes(three(30, 5000)))
    calls = 0

    def flaky(name: str, start: int, stop: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ConnectionResetError("connection reset by peer")
        return storage.read_range(name, start, stop)

    assert index_tar(str(path), read=flaky) == index_tar(str(path))
    assert calls > 3


class CountingReader:
    """A range reader that remembers its requests, as (start, stop)."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []

    def __call__(self, url: str, start: int, stop: int) -> bytes:
        self.requests.append((start, stop))
        return storage.read_range(url, start, stop)

    @property
    def bytes_read(self) -> int:
        return sum(stop - start for start, stop in self.requests)


def large_files(count: int, *, small: int = 2) -> list[tuple[str, bytes]]:
    """Samples of a member of 1 MB and ``small`` members of up to 3 kB."""
    return [
        (f"{i:04d}.{ext}", bytes([i + 1]) * length)
        for i in range(count)
        for ext, length in [("jpg", 1_000_000 + i), ("seg.png", 3000), ("cls", 1)][: 1 + small]
    ]


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("small", [0, 2])
def test_planning_a_remote_tar_of_large_members_does_not_read_them(tmp_path: Path, kind: int, small: int) -> None:
    # All of the input was downloaded before anything started.
    data = tar_bytes(large_files(40, small=small), kind)
    url = f"memory://test_window{tmp_path}/large.tar"
    storage.write_atomic(url, data)
    read = CountingReader()
    index = index_tar(url, read=read)
    assert index.samples == index_bytes(tmp_path, data).samples
    assert read.bytes_read / len(data) < 0.05
    assert len(read.requests) <= 40 + 5, "one for each large member"


def test_large_members_among_small_ones_are_jumped_over(tmp_path: Path) -> None:
    sizes = [3000] * 200 + [5_000_000] * 5 + [3000] * 200 + [100_000] * 50
    data = tar_bytes([(f"{i:04d}.jpg", bytes([i % 251]) * size) for i, size in enumerate(sizes)])
    url = f"memory://test_window{tmp_path}/mixed.tar"
    storage.write_atomic(url, data)
    read = CountingReader()
    index = index_tar(url, read=read)
    assert index.samples == index_bytes(tmp_path, data).samples
    assert read.bytes_read < len(data) - 5 * 4_000_000
    assert len(read.requests) < 30


def dali_index(data: bytes, samples: int) -> str:
    """The index that DALI's wds2idx writes."""
    lines: dict[str, list[str]] = {}
    for info in members_of(data):
        key, _, ext = info.name.partition(".")
        lines.setdefault(key, []).append(f"{ext} {info.offset_data} {info.size} {info.name}")
    assert len(lines) == samples
    return "\n".join([f"v1.2 {samples}", *(" ".join(words) for words in lines.values())]) + "\n"


def place_with_index(folder: str, data: bytes, text: str) -> str:
    storage.write_atomic(f"{folder}/a.tar", data)
    storage.write_atomic(f"{folder}/a.idx", text.encode())
    return f"{folder}/a.tar"


class SlowReader(CountingReader):
    """Also measures how many requests are under way at once."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.now = 0
        self.most = 0

    def __call__(self, url: str, start: int, stop: int) -> bytes:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        data = super().__call__(url, start, stop)
        with self.lock:
            self.now -= 1
        return data


def test_a_dali_index_lets_headers_come_in_parallel_and_changes_nothing(tmp_path: Path) -> None:
    data = tar_bytes(large_files(30), tarfile.GNU_FORMAT)
    expected = index_bytes(tmp_path, data)
    url = place_with_index(f"memory://test_window{tmp_path}", data, dali_index(data, 30))
    read = SlowReader()
    index = index_tar(url, read=read)
    assert (index.samples, index.digest, index.faults) == (expected.samples, expected.digest, ())
    assert read.bytes_read / len(data) < 0.01
    assert len(read.requests) <= 30 + 5, "small neighbours come with the header of the large member"
    assert read.most > 4


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _shifted(text: str) -> str:
    return re.sub(r"(?<= )\d{4,}(?= )", lambda found: str(int(found[0]) + 512), text)


def _of_another_tar(text: str) -> str:
    head, *lines = text.splitlines()
    return "\n".join([head, *("jpg 512 10 x.jpg" for _ in lines)])


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _shifted,
        _of_another_tar,
        lambda text: text.replace("v1.2", "v1.1"),
        lambda text: text.replace("0003.jpg", "a name with blanks.jpg"),
        lambda text: "<html>not found</html>",
        lambda text: "",
    ],
    ids=["cut", "shifted", "other", "version", "blanks", "html", "empty"],
)
def test_a_dali_index_that_is_wrong_changes_nothing(tmp_path: Path, damage: Callable[[str], str]) -> None:
    data = tar_bytes(large_files(12), tarfile.GNU_FORMAT)
    expected = index_bytes(tmp_path, data)
    url = place_with_index(f"memory://test_window{tmp_path}", data, damage(dali_index(data, 12)))
    index = index_tar(url)
    assert (index.samples, index.faults) == (expected.samples, ())


def test_what_a_dali_index_leaves_out_is_found(tmp_path: Path) -> None:
    files = large_files(6)
    files.insert(4, ("README", b"no sample" * 100))
    data = tar_bytes(files, tarfile.PAX_FORMAT)
    text = "\n".join(
        line for line in dali_index(data, 7).replace("v1.2 7", "v1.2 6").splitlines() if "README" not in line
    )
    index = index_tar(place_with_index(f"memory://test_window{tmp_path}", data, text))
    assert len(index.samples) == 6
    assert index.ignored == (("no extension", 1),)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("v1.1 1\njpg 512 3 a.jpg", r"its first line is 'v1\.1 1', wanted 'v1\.2 NUMBER'"),
        ("v1.2 2\njpg 512 3 a.jpg", "lists 1 samples, and its first line says 2"),
        ("v1.2 1\njpg 512 3", "line 2 is not of the form 'EXTENSION OFFSET SIZE NAME'"),
        ("v1.2 1\njpg x 3 a.jpg", "line 2 gives 'x' and '3' as an offset and a size"),
    ],
)
def test_a_dali_index_of_another_form_is_not_believed(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_dali_index(text)


def test_the_side_file_of_a_signed_url_is_not_asked_for() -> None:
    assert header_ranges("https://127.0.0.1:1/a.tar?X-Amz-Signature=x", 10**9) == []

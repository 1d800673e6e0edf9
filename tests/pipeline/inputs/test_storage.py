import errno
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import braceexpand
import pytest

from pipeline.errors import EnvironmentFault, InputError
from pipeline.inputs import patterns, storage
from tests.pipeline.inputs.conftest import CONTENT


def test_names_of_this_machine_and_others() -> None:
    assert all(storage.is_local(name) for name in ("a/b", "/a", "file:///a"))
    assert not any(storage.is_local(name) for name in ("s3://a", "memory://a", "simplecache::s3://a"))
    assert storage.local_path("file:///a/b c") == "/a/b c"
    assert storage.local_path("a/b") == "a/b"
    with pytest.raises(ValueError, match="s3://a is not a local name"):
        storage.local_path("s3://a")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("a", "b", "c"), "a/b/c"),
        (("/", "b"), "/b"),
        (("a/", "/b/"), "a/b"),
        (("memory://", "b"), "memory://b"),
        (("s3://bucket", "x/y", "", "z"), "s3://bucket/x/y/z"),
        (("a", ""), "a"),
    ],
)
def test_join(parts: tuple[str, ...], expected: str) -> None:
    assert storage.join(*parts) == expected


def test_writing_reading_listing_and_removing(root: str) -> None:
    name = storage.join(root, "folder", "deep", "a.bin")
    assert not storage.exists(name)
    storage.write_atomic(name, b"old")
    storage.write_atomic(name, CONTENT)
    assert storage.exists(name)
    assert storage.read_bytes(name) == CONTENT
    assert storage.stat(name).size == len(CONTENT)
    storage.write_atomic(storage.join(root, "b.bin"), b"")
    assert storage.read_bytes(storage.join(root, "b.bin")) == b""
    assert storage.list_files(root) == ["b.bin", "folder/deep/a.bin"]
    assert storage.list_files(storage.join(root, "folder")) == ["deep/a.bin"]
    storage.remove(name)
    storage.remove(name)
    assert storage.list_files(root) == ["b.bin"]
    assert storage.list_files(storage.join(root, "none")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(name)
    with pytest.raises(FileNotFoundError):
        storage.stat(name)


def test_making_folders_twice_is_fine(root: str) -> None:
    folder = storage.join(root, "x", "y", "z")
    storage.make_dirs(folder)
    storage.make_dirs(folder)
    assert storage.exists(folder)


def test_ranges_are_exact_or_an_error(root: str) -> None:
    name = storage.join(root, "a.bin")
    storage.write_atomic(name, CONTENT)
    assert storage.read_range(name, 0, len(CONTENT)) == CONTENT
    assert storage.read_range(name, 300, 1001) == CONTENT[300:1001]
    assert storage.read_range(name, 7, 7) == b""
    with pytest.raises(EOFError, match="48 bytes came of 100 from byte 2000"):
        storage.read_range(name, 2000, 2100)
    with pytest.raises(EOFError, match="0 bytes came of 1 from byte 5000"):
        storage.read_range(name, 5000, 5001)
    with pytest.raises(ValueError, match="no such byte range: 5 to 4"):
        storage.read_range(name, 5, 4)
    with pytest.raises(FileNotFoundError):
        storage.read_range(name + "x", 0, 1)


def test_the_stamp_changes_when_a_file_is_written_again(root: str) -> None:
    name = storage.join(root, "a.bin")
    storage.write_atomic(name, CONTENT)
    first = storage.stat(name)
    assert first.stamp
    assert storage.stat(name) == first
    storage.write_atomic(name, CONTENT[::-1])
    if storage.is_local(name):
        os.utime(storage.local_path(name), ns=(0, int(first.stamp) + 1))
    again = storage.stat(name)
    assert again.size == first.size
    assert again.stamp != first.stamp


def test_files_being_written_are_not_listed(tmp_path: Path) -> None:
    for name in (".0123.partial", "c/.0.1.9f.partial", "whole.bin"):
        storage.write_atomic(str(tmp_path / name), b"x")
    assert storage.list_files(str(tmp_path)) == ["whole.bin"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(EnvironmentFault, match="a folder of that name is there"):
        storage.write_atomic(str(tmp_path / "taken"), b"data")
    assert os.listdir(tmp_path) == ["taken"]


def _write_often(path: str, letter: bytes) -> None:
    for _ in range(30):
        storage.write_atomic(path, letter * 300_000)


def test_readers_see_whole_files_while_threads_and_processes_write(tmp_path: Path) -> None:
    path = str(tmp_path / "contested.bin")
    _write_often(path, b"a")
    process = multiprocessing.get_context("spawn").Process(target=_write_often, args=(path, b"p"))
    process.start()
    seen = set()
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(_write_often, path, letter) for letter in (b"s", b"t")]
        while process.is_alive() or not all(writer.done() for writer in writers):
            data = storage.read_bytes(path)
            seen.add((len(data), len(set(data))))
    process.join()
    assert [writer.result() for writer in writers] == [None, None]
    assert process.exitcode == 0
    assert seen == {(300_000, 1)}
    assert os.listdir(tmp_path) == ["contested.bin"]


def test_syncing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    storage.sync_file(str(tmp_path / "a"))
    storage.sync_file(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        storage.sync_file(str(tmp_path / "b"))


def test_braces_expand_as_webdataset_writes_them() -> None:
    pattern = "s3://bucket/{train,val}-{000..012}.tar"
    assert patterns.expand([pattern]) == list(braceexpand.braceexpand(pattern))
    assert len(patterns.expand([pattern])) == 26


def test_globs_are_sorted_and_patterns_keep_their_order(root: str) -> None:
    for name in ("val-1.tar", "train-10.tar", "train-02.tar", "train-02.txt", "deep/er/x.tar"):
        storage.write_atomic(storage.join(root, name), b"x")

    def expand(*written: str) -> list[str]:
        names = patterns.expand([storage.join(root, pattern) for pattern in written])
        assert all(storage.exists(name) or "missing" in name for name in names)
        return [name.removeprefix(root + "/") for name in names]

    assert expand("val-?.tar", "missing.tar", "train-*.tar") == [
        "val-1.tar", "missing.tar", "train-02.tar", "train-10.tar",
    ]  # fmt: skip
    assert expand("{val,train}-*[0-9].tar") == ["val-1.tar", "train-02.tar", "train-10.tar"]
    assert expand("**/x.tar") == ["deep/er/x.tar"]


def test_a_plain_name_with_glob_signs_in_it_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "shard[1].tar"
    path.write_bytes(b"x")
    assert patterns.expand([str(path)]) == [str(path)]
    signed = "https://host/a.tar?X-Amz-Signature=a[b]"
    assert patterns.expand([signed]) == [signed]


def test_patterns_that_cannot_be_meant_are_errors(root: str, tmp_path: Path) -> None:
    storage.write_atomic(storage.join(root, "a-1.tar"), b"x")
    with pytest.raises(InputError, match="no input shards are named"):
        patterns.expand([])
    with pytest.raises(InputError, match=r"b-\*\.tar' matches no file; check the path"):
        patterns.expand([storage.join(root, "b-*.tar")])
    with pytest.raises(InputError, match=r"b-\*\.tar' \(part of .*\{a,b\}.* matches no file"):
        patterns.expand([storage.join(root, "{a,b}-*.tar")])
    with pytest.raises(InputError, match=r"1 of 2 input names come twice, first .*a-1\.tar; .*overlap"):
        patterns.expand([storage.join(root, "a-1.tar"), storage.join(root, "*.tar")])
    with pytest.raises(InputError, match=r"a\{1\.\.2' cannot be expanded: .*close every brace"):
        patterns.expand(["a{1..2"])
    with pytest.raises(InputError, match=r"is a folder, and a tar file is wanted; write .*/\*\.tar"):
        patterns.expand([str(tmp_path)])


def test_the_same_local_file_by_two_spellings_is_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="come twice"):
        patterns.expand([f"{tmp_path}/a.tar", f"file://{tmp_path}/./a.tar"])


def test_unknown_schemes_and_missing_packages_say_what_to_do() -> None:
    with pytest.raises(InputError, match=r"nosuch://a cannot be served.*use a path or a URL that fsspec knows"):
        storage.stat("nosuch://a")


def test_http_by_ranges(server: str) -> None:
    url = f"{server}/ranged.tar?signature=abc"
    assert patterns.expand([url]) == [url]
    assert storage.stat(url) == storage.FileStat(len(CONTENT), '"version-1"')
    assert storage.read_range(url, 10, 500) == CONTENT[10:500]
    assert storage.read_bytes(url) == CONTENT
    with pytest.raises(EOFError, match="48 bytes came of 100"):
        storage.read_range(url, 2000, 2100)
    with pytest.raises(FileNotFoundError):
        storage.read_range(f"{server}/none.tar", 0, 10)


def test_http_without_ranges_is_an_error(server: str) -> None:
    with pytest.raises(InputError, match="2048 bytes came where 90 were asked for: the server ignores byte ranges"):
        storage.read_range(f"{server}/whole.tar", 10, 100)


def test_errors_of_remote_clients_become_oserrors(server: str) -> None:
    with pytest.raises(OSError, match="503") as caught:
        storage.read_range(f"{server}/broken.tar", 0, 10)
    assert not isinstance(caught.value, FileNotFoundError)


class Flaky:
    """Raises the given errors one after the other, then returns how often it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def test_errors_that_pass_are_retried_with_growing_waits() -> None:
    waits: list[float] = []
    action = Flaky(ConnectionResetError("reset"), TimeoutError("slow"), OSError(errno.EIO, "input/output error"))
    assert storage.with_retries(action, what="reading", sleep=waits.append) == 4
    assert waits == [0.2, 0.4, 0.8]


def test_the_last_error_is_raised_in_context() -> None:
    waits: list[float] = []
    action = Flaky(*(OSError(errno.EIO, f"try {i}") for i in range(9)))
    with pytest.raises(OSError, match=r"reading x failed 3 times, the last time with OSError.*try 2") as caught:
        storage.with_retries(action, what="reading x", attempts=3, first_wait=1.0, sleep=waits.append)
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value.__cause__, OSError)
    assert action.calls == 3
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("x"),
        IsADirectoryError("x"),
        NotADirectoryError("x"),
        OSError(errno.ENOSPC, "disk full"),
        OSError(errno.EROFS, "read-only"),
        ValueError("x"),
        InputError("x"),
    ],
    ids=repr,
)
def test_errors_that_last_are_raised_at_once(error: Exception) -> None:
    action = Flaky(error)
    with pytest.raises(type(error)) as caught:
        storage.with_retries(action, what="reading", sleep=lambda seconds: pytest.fail("waited"))
    assert caught.value is error
    assert action.calls == 1


def test_fetching_tells_a_cut_connection_from_a_file_that_shrank(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    failures = [EOFError("cut")]

    def read(url: str, start: int, stop: int) -> bytes:
        if failures:
            raise failures.pop()
        return storage.read_range(url, start, stop)

    assert storage.fetch(str(path), 5, 50, read) == CONTENT[5:50]
    with pytest.raises(InputError, match=r"has 2048 bytes where 3000 are needed.*Run the job again"):
        storage.fetch(str(path), 5, 3000)
    with pytest.raises(InputError, match="is gone since it was indexed"):
        storage.fetch(str(tmp_path / "none"), 0, 5)

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def test_what_a_reader_imports_needs_no_package_of_a_writer() -> None:
    code = (
        "import sys, pipeline.inputs.storage, pipeline.inputs.plan_update\n"
        "packages = 'ray timm jsonargparse yaml PIL simplejpeg webdataset braceexpand matplotlib'\n"
        "print(sorted(set(packages.split()) & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

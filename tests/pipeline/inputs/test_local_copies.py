import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from pipeline.errors import EnvironmentFault, InputError
from pipeline.inputs import storage
from pipeline.inputs.local_copies import cache_folders, local_copy
from tests.pipeline.inputs.conftest import CONTENT
from tests.servers import serving

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_local_copy_of_a_local_file_is_the_file_itself(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    assert local_copy(path) == path
    assert local_copy(f"file://{path}") == path


def test_a_local_copy_of_a_remote_file_has_its_bytes_and_its_name(tmp_path: Path, cache: Path) -> None:
    urls = [f"memory://test_copies{tmp_path}/{folder}/weights.safetensors" for folder in ("a", "b")]
    for number, url in enumerate(urls):
        storage.write_atomic(url, CONTENT[number:])
    paths = [local_copy(url) for url in urls]
    for number, path in enumerate(paths):
        assert Path(path).read_bytes() == CONTENT[number:]
        assert Path(path).name == "weights.safetensors", "what reads it may tell its format by the ending"
        assert Path(path).is_relative_to(cache)
    assert [local_copy(url) for url in urls] == paths
    assert not list(cache.rglob("*.partial"))


def test_a_file_that_was_replaced_is_fetched_again(tmp_path: Path) -> None:
    url = f"memory://test_copies{tmp_path}/a.bin"
    storage.write_atomic(url, b"old")
    assert Path(local_copy(url)).read_bytes() == b"old"
    storage.write_atomic(url, b"new")
    assert Path(local_copy(url)).read_bytes() == b"new"


def test_a_copy_of_known_content_is_used_wherever_it_came_from(tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    url = f"memory://test_copies{tmp_path}/a.bin"
    storage.write_atomic(url, CONTENT)
    path = local_copy(url, digest)
    storage.remove(url)
    assert local_copy(f"memory://test_copies{tmp_path}/moved/a.bin", digest) == path


def test_other_content_than_expected_is_refused_and_not_kept(tmp_path: Path, cache: Path) -> None:
    url = f"memory://test_copies{tmp_path}/a.bin"
    storage.write_atomic(url, CONTENT)
    with pytest.raises(InputError, match=r"a\.bin is not the file that was expected: its sha256 is .*, wanted 00"):
        local_copy(url, "00")
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_local_copy_of_what_is_not_there_is_an_error_each_time(tmp_path: Path) -> None:
    url = f"memory://test_copies{tmp_path}/late.bin"
    with pytest.raises(FileNotFoundError):
        local_copy(url)
    storage.write_atomic(url, CONTENT)
    assert Path(local_copy(url)).read_bytes() == CONTENT


class _CountingServer(BaseHTTPRequestHandler):
    """Serves CONTENT whole, slowly, and counts how often it was fetched. Without a stamp where the path says so."""

    fetched = 0

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()
        type(self).fetched += 1
        for start in range(0, len(CONTENT), 512):
            self.wfile.write(CONTENT[start : start + 512])
            self.wfile.flush()
            threading.Event().wait(0.05)

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        if "stampless" not in self.path:
            self.send_header("ETag", '"one"')
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def counting_server() -> Iterator[str]:
    _CountingServer.fetched = 0
    with serving(_CountingServer) as address:
        yield address


def _copy_in_a_process(url: str, env: dict[str, str]) -> str:
    code = f"from pipeline.inputs import storage; print(storage.local_copy({url!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60
    )
    return run.stdout.strip()


def test_processes_of_a_node_share_one_copy_that_is_fetched_once(cache: Path, counting_server: str) -> None:
    # Every process fetched a copy of its own, which went with it: eight actors fetched the weights eight times.
    url = f"{counting_server}/weights.bin"
    with ThreadPoolExecutor(3) as pool:
        paths = list(
            pool.map(lambda n: _copy_in_a_process(f"{url}?signature={n}", {"FEATUP_CACHE": str(cache)}), "abc")
        )
    assert len(set(paths)) == 1
    assert Path(paths[0]).read_bytes() == CONTENT
    assert Path(paths[0]).name == "weights.bin", "the signature is not part of the name"
    assert _CountingServer.fetched == 1


def test_a_store_without_stamps_is_asked_each_time_and_kept_once(cache: Path, counting_server: str) -> None:
    url = f"{counting_server}/stampless.bin"
    assert local_copy(url) == local_copy(url)
    assert _CountingServer.fetched == 2
    assert len(list(cache.rglob("stampless.bin"))) == 1


def test_copies_lie_in_the_home_folder_or_where_that_cannot_be_written_in_the_temporary_one(
    tmp_path: Path, counting_server: str
) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    url = f"{counting_server}/a.bin"
    env = {"HOME": str(home), "TMPDIR": str(temporary)}
    assert Path(_copy_in_a_process(url, env)).is_relative_to(home / ".cache" / "featup")
    (tmp_path / "file").touch()
    env["HOME"] = str(tmp_path / "file")
    assert Path(_copy_in_a_process(url, env)).is_relative_to(temporary / f"featup-{os.getuid()}")


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://test_copies{tmp_path}/a.bin"
    storage.write_atomic(url, CONTENT)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEATUP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EnvironmentFault, match=r"no folder for a local copy .*file/cache: .*; set FEATUP_CACHE"):
        local_copy(url)


def test_a_user_without_a_home_folder_gets_no_folder_called_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATUP_CACHE")
    monkeypatch.setenv("HOME", "~")
    assert all(os.path.isabs(folder) for folder in cache_folders())

"""Published checkpoints: downloaded from a server, held against their digest, and cached."""

import hashlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from featup.errors import WeightsError
from featup.published import PublishedFile, checkpoint_file, fetch
from tests.servers import serving

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "some.pth").write_bytes(CONTENT)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with serving(handler) as address:
        yield f"{address}/some.pth"


def test_downloads_once(server: str, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    assert fetch(PublishedFile(server, SHA256), cache).read_bytes() == CONTENT
    (tmp_path / "served" / "some.pth").unlink()
    assert fetch(PublishedFile(server, SHA256), cache) == cache / "some.pth"


def test_other_bytes_are_refused_and_not_kept(server: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"does not have the sha256 {'0' * 64}.*--checkpoint FILE"):
        fetch(PublishedFile(server, "0" * 64), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_refused(server: str, tmp_path: Path) -> None:
    (tmp_path / "some.pth").write_bytes(b"other")
    with pytest.raises(WeightsError, match=f"some.pth has sha256 .* has {SHA256}.*remove it"):
        fetch(PublishedFile(server, SHA256), tmp_path)


def test_without_network_one_line_says_what_to_get(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/some.pth"
    with pytest.raises(WeightsError, match=f"some.pth cannot be downloaded.*{SHA256}.*--checkpoint FILE") as caught:
        fetch(PublishedFile(url, SHA256), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_given_file_comes_first() -> None:
    assert checkpoint_file("anyup", "mine.pth") == Path("mine.pth")
    assert checkpoint_file("bilateral", None) is None

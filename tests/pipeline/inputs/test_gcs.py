"""Conditional writes on Google Cloud Storage, against the part of its JSON interface that they use."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec.config
import pytest

from pipeline.errors import EnvironmentFault
from pipeline.inputs.storage import create_exclusive, read_with_token, replace_if


class _Gcs(BaseHTTPRequestHandler):
    """Objects of one bucket, with generations: uploads by media, metadata, downloads."""

    objects: dict[str, tuple[bytes, int]] = {}  # noqa: RUF012 - emptied by each test

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        place, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        if place.path != "/upload/storage/v1/b/bucket/o":
            self._send(404, b"{}")
            return
        assert query["uploadType"] == ["media"]
        (name,), (generation,) = query["name"], query["ifGenerationMatch"]
        current = self.objects.get(name, (b"", 0))[1]
        if int(generation) != current:
            self._send(412, b'{"error": {"code": 412, "message": "conditionNotMet"}}')
            return
        self.objects[name] = (data, current + 1)
        self._send(200, self._about(name))

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        name = unquote(place.path.partition("/o/")[2])
        if name not in self.objects:
            self._send(404, b"{}")
        elif "alt=media" in place.query:
            self._send(200, self.objects[name][0])
        else:
            self._send(200, self._about(name))

    def _about(self, name: str) -> bytes:
        data, generation = self.objects[name]
        about = {"name": name, "bucket": "bucket", "size": str(len(data)), "generation": str(generation)}
        return json.dumps(about).encode()

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # Without this gcsfs asks the real service by gRPC what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    _Gcs.objects = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gcs) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        options = {"endpoint_url": f"http://127.0.0.1:{http.server_port}", "token": "anon"}
        monkeypatch.setitem(fsspec.config.conf, "gs", options)
        yield "gs://bucket/store/lease.json"
        gcsfs.GCSFileSystem.clear_instance_cache()
        http.shutdown()
        thread.join()


def test_a_file_is_created_once_and_replaced_by_the_reader_of_its_version(url: str) -> None:
    assert create_exclusive(url, b"one") is True
    assert create_exclusive(url, b"two") is False
    data, token = read_with_token(url)
    assert data == b"one"
    newer = replace_if(url, b"two", token)
    assert newer not in (None, token)
    assert replace_if(url, b"three", token) is None
    assert read_with_token(url) == (b"two", newer)


def test_a_file_that_is_gone_is_not_replaced(url: str) -> None:
    create_exclusive(url, b"one")
    _, token = read_with_token(url)
    _Gcs.objects.clear()
    assert replace_if(url, b"two", token) is None
    with pytest.raises(FileNotFoundError):
        read_with_token(url)


def test_a_bucket_that_does_not_exist_is_named(url: str) -> None:
    with pytest.raises(EnvironmentFault, match="there is no bucket 'buckte'"):
        create_exclusive("gs://buckte/lease.json", b"x")

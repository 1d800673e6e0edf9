"""Places of every kind that the code under test reads and writes."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.servers import serving

CONTENT = bytes(range(256)) * 8


@pytest.fixture(params=["path", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, as a plain path, a file:// URL and a remote URL."""
    return {
        "path": f"{tmp_path}",
        "file": f"file://{tmp_path}",
        "memory": f"memory://test_storage{tmp_path}",
    }[request.param]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server on this machine, with the bucket ``bucket``."""
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path_factory.mktemp("aws") / "none"))
        moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem().call_s3("create_bucket", Bucket="bucket")
        yield endpoint
        s3fs.S3FileSystem.clear_instance_cache()
        moto.stop()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path) -> str:
    """An empty folder in a bucket of an S3 server on this machine."""
    return f"s3://bucket{tmp_path}"


class RangeServer(BaseHTTPRequestHandler):
    """Serves CONTENT: at /ranged with byte ranges, at /whole without, at /broken not at all.

    At /flaky every other request fails with 503, and /denied answers 403.
    """

    requests = 0

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        type(self).requests += 1
        failing = "broken" in self.path or ("flaky" in self.path and self.requests % 2)
        if failing or "none" in self.path or "denied" in self.path:
            self.send_error(503 if failing else 404 if "none" in self.path else 403)
            return
        start, stop = 0, len(CONTENT)
        asked = None if "whole" in self.path else self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, stop)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", '"version-1"')
        self.end_headers()
        if send:
            self.wfile.write(CONTENT[start:stop])

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec serves http through aiohttp, which is not installed")
    with serving(RangeServer) as address:
        yield address

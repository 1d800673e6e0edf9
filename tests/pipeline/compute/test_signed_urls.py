"""The same tar under a new signature: it was refused, and the first signature was stored in five places."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.e2e.support import good_sample, write_tar
from tests.pipeline.compute.support import make_config, open_store
from tests.servers import serving


class OneFile(BaseHTTPRequestHandler):
    """Serves a file with byte ranges, whatever the query."""

    data = b""

    def do_HEAD(self) -> None:
        self._answer(b"", len(self.data))

    def do_GET(self) -> None:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = self.data[int(first) : int(last or len(self.data)) + 1]
        self._answer(part, len(part))

    def _answer(self, body: bytes, length: int) -> None:
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"v1"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[str]:
    with serving(OneFile) as address:
        yield address


FIRST, SECOND = "X-Amz-Signature=f1r57s3cr37", "X-Amz-Signature=s3c0nds3cr37"


def test_a_new_signature_resumes_and_none_is_stored_anywhere(
    tmp_path: Path, server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    members = [member for n in range(8) for member in good_sample(f"k{n}", n)]
    members[4:5] = [("k2.jpg", b"no image")]
    OneFile.data = write_tar(tmp_path / "a.tar", members).read_bytes()
    out = tmp_path / "out"
    first = open_store(make_config(f"{server}/a.tar?{FIRST}", out, labels=("seg",)))
    first.run(units=1)
    second = open_store(make_config(f"{server}/a.tar?{SECOND}", out, labels=("seg",)))
    assert second.ledger.done().todo(second.plan.units).tolist() == [1]
    assert (summary := second.run()).ok == 7, summary.text()
    stored = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(stored) > 10
    printed = "\n".join((*first.lines, *second.lines, *capfd.readouterr()))
    assert "s3cr37" not in printed
    assert [str(path.relative_to(out)) for path, data in stored.items() if b"s3cr37" in data] == []

"""Object stores: a real S3 server on this machine, and one that answers as servers in trouble do."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec.config
import pytest

from pipeline.errors import EnvironmentFault, InputChangedError
from pipeline.inputs import patterns, storage
from pipeline.inputs.images import list_images
from pipeline.inputs.manifest import load_manifest
from pipeline.inputs.manifest_update import update_manifests
from pipeline.inputs.plan import plan_shard
from pipeline.inputs.read import read_samples
from tests.pipeline.inputs.conftest import CONTENT
from tests.pipeline.inputs.tars import index_bytes, tar_bytes, three


def test_files_of_a_bucket_are_written_read_listed_and_removed(s3: str) -> None:
    name = storage.join(s3, "folder/a.bin")
    assert not storage.exists(name)
    assert storage.list_files(s3) == []
    storage.write_atomic(name, CONTENT[:100], CONTENT[100:])
    assert storage.exists(name)
    assert storage.read_bytes(name) == CONTENT
    assert storage.read_range(name, 10, 500) == CONTENT[10:500]
    assert storage.list_files(s3) == ["folder/a.bin"]
    assert patterns.expand([storage.join(s3, "folder/*.bin")]) == [name]
    first = storage.stat(name)
    assert first.size == len(CONTENT)
    storage.write_atomic(name, CONTENT[::-1])
    assert storage.stat(name).stamp != first.stamp
    storage.remove(name)
    storage.remove(name)
    for read in (storage.read_bytes, storage.stat):
        with pytest.raises(FileNotFoundError):
            read(name)


def test_a_range_beyond_the_end_is_an_error_of_its_own(s3: str) -> None:
    name = storage.join(s3, "a.bin")
    storage.write_atomic(name, CONTENT)
    with pytest.raises(EOFError, match="48 bytes came of 100 from byte 2000"):
        storage.read_range(name, 2000, 2100)
    with pytest.raises(EOFError, match="0 bytes came of 1 from byte 5000"):
        storage.read_range(name, 5000, 5001)
    with pytest.raises(InputChangedError, match="it became shorter since it was indexed"):
        storage.fetch(name, 5000, 5001)


def test_a_tar_in_a_bucket_is_planned_as_on_disk(s3: str, tmp_path: Path) -> None:
    data = tar_bytes(three(30, 5000))
    storage.write_atomic(storage.join(s3, "a.tar"), data)
    shard = plan_shard(storage.join(s3, "a.tar"), storage.join(s3, "index"))
    assert shard.digest == index_bytes(tmp_path, data).digest
    assert shard.stamp


def test_images_in_a_bucket_are_listed_and_read_as_on_disk(s3: str) -> None:
    for name in ("photos/b.jpg", "photos/a/x.png", "photos/.hidden.jpg", "photos/notes.txt", "masks/a/x.png"):
        storage.write_atomic(storage.join(s3, name), name.encode())
    listed = list_images(
        [storage.join(s3, "photos")], ("jpg", "png"), {"seg": ("seg.png",)}, {"seg": storage.join(s3, "masks")}
    )
    (manifest,) = update_manifests(storage.join(s3, "plan"), listed)
    index = load_manifest(manifest)
    assert [sample.key for sample in index.samples] == ["a/x", "b"]
    assert read_samples(index, 0, 2) == [
        {"png": b"photos/a/x.png", "seg.png": b"masks/a/x.png"},
        {"jpg": b"photos/b.jpg"},
    ]
    storage.write_atomic(storage.join(s3, "photos/b.jpg"), b"photos/B.jpg")
    with pytest.raises(InputChangedError, match=r"b\.jpg changed since it was listed"):
        read_samples(index, 1, 2)


def test_no_bucket_is_created_by_a_typo(s3: str) -> None:
    # makedirs created the bucket, and a store of a hundred terabytes went where nobody looked for it.
    url = "s3://buckte/store/plan"
    storage.make_dirs(url)
    with pytest.raises(EnvironmentFault) as caught:
        storage.write_atomic(storage.join(url, "plan.json"), b"{}")
    assert str(caught.value) == (
        "writing s3://buckte/store/plan/plan.json: there is no bucket 'buckte'; check its name, or create it (buckets "
        "are never created here)"
    )
    assert not storage.exists("s3://buckte")
    assert storage.list_files(url) == []
    storage.make_dirs(storage.join(s3, "folder"))
    assert storage.list_files(s3) == [], "no empty object stands for a folder"


class _Trouble(BaseHTTPRequestHandler):
    """Answers each request by the next of ``answers`` (an HTTP status, an S3 error code), then with success."""

    protocol_version = "HTTP/1.1"  # so that a body is announced before it is sent
    answers: list[tuple[int, str]] = []  # noqa: RUF012 - set anew by each test
    requests = 0

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(CONTENT)

    def do_HEAD(self) -> None:
        self._answer(b"")

    def _answer(self, content: bytes) -> None:
        cls = type(self)
        cls.requests += 1
        status, code = cls.answers.pop(0) if cls.answers else (200, "")
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode() if code else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"etag"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Trouble]]:
    """An S3 endpoint in trouble. Neither botocore nor s3fs retry, so that ours are what is tested."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    _Trouble.answers, _Trouble.requests = [], 0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Trouble) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        options = {
            "endpoint_url": f"http://127.0.0.1:{http.server_port}",
            "key": "key",
            "secret": "secret",
            "config_kwargs": {"retries": {"max_attempts": 0}, "request_checksum_calculation": "when_required"},
        }
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        yield _Trouble
        s3fs.S3FileSystem.clear_instance_cache()
        http.shutdown()
        thread.join()


PASSING = [(500, "InternalError"), (503, "ServiceUnavailable"), (400, "RequestTimeout"), (400, "BadDigest")]


def test_a_put_is_repeated_while_the_store_is_in_trouble(trouble: type[_Trouble]) -> None:
    # A write that failed once cost the whole unit, which was computed again.
    trouble.answers = list(PASSING)
    storage.write_atomic("s3://bucket/a", b"x")
    assert trouble.requests == 5


def test_a_get_is_repeated_while_the_store_is_in_trouble(trouble: type[_Trouble]) -> None:
    trouble.answers = PASSING[:2]
    assert storage.read_bytes("s3://bucket/a") == CONTENT


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_access_denied_is_told_at_once(trouble: type[_Trouble], code: str) -> None:
    trouble.answers = [(403, code)] * 9
    with pytest.raises(EnvironmentFault) as caught:
        storage.write_atomic("s3://bucket/a", b"x")
    assert trouble.requests == 1
    assert str(caught.value) == (
        f"writing s3://bucket/a: access denied ({code}); the credentials may have expired or lack the right to it: "
        "renew them or change the policy of the bucket, then run the same command again: finished units count"
    )
    with pytest.raises(EnvironmentFault, match="reading s3://bucket/a: access denied"):
        storage.read_bytes("s3://bucket/a")


def test_a_store_that_is_full_is_told_at_once(trouble: type[_Trouble]) -> None:
    trouble.answers = [(507, "XMinioStorageFull")] * 9
    with pytest.raises(EnvironmentFault, match="no space is left on the device of bucket; free space, then run"):
        storage.write_atomic("s3://bucket/a", b"x")
    assert trouble.requests == 1


def test_a_store_that_stays_in_trouble_is_one_line(trouble: type[_Trouble]) -> None:
    trouble.answers = [(500, "InternalError")] * 9
    with pytest.raises(EnvironmentFault, match=r"writing s3://bucket/a failed 5 times.*; check the network, the end"):
        storage.write_atomic("s3://bucket/a", b"x")


def test_a_conditional_put_whose_answer_was_lost_is_recognised(trouble: type[_Trouble]) -> None:
    # The first put was stored, its answer was an error; the second meets the first.
    trouble.answers = [(500, "InternalError"), (412, "PreconditionFailed")]
    assert storage.create_exclusive("s3://bucket/a", CONTENT) is True
    trouble.answers = [(500, "InternalError"), (412, "PreconditionFailed")]
    assert storage.create_exclusive("s3://bucket/a", b"of another writer") is False
    trouble.answers = [(409, "ConditionalRequestConflict")]
    assert storage.replace_if("s3://bucket/a", b"x", '"old"') == '"etag"'


def test_a_server_that_does_not_answer_is_not_taken_for_a_missing_file() -> None:
    # The shard was listed as missing, and the job went on without it.
    with pytest.raises(EnvironmentFault, match=r"looking up http://127\.0\.0\.1:1/a\.tar failed 5 times.*; check"):
        storage.stat("http://127.0.0.1:1/a.tar?signature=5ec7e7")


def test_http_in_trouble_is_told_from_what_is_missing_or_denied(server: str) -> None:
    assert storage.read_bytes(f"{server}/flaky.bin") == CONTENT
    assert storage.stat(f"{server}/flaky.bin").size == len(CONTENT)
    with pytest.raises(FileNotFoundError):
        storage.stat(f"{server}/none.bin")
    with pytest.raises(OSError, match=r"looking up .* failed 5 times.*503"):
        storage.stat(f"{server}/broken.bin")
    for action, verb in ((storage.read_bytes, "reading"), (storage.stat, "looking up")):
        with pytest.raises(EnvironmentFault, match=rf"{verb} http.*denied\.bin: access denied \(403\)"):
            action(f"{server}/denied.bin?signature=x")
    with pytest.raises(EnvironmentFault, match=r"writing http.*does not support this \(501.*; give a local folder, s3"):
        storage.write_atomic(f"{server}/a.bin", b"x")

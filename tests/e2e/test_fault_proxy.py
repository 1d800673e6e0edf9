"""The fault proxy itself, without a job."""

import http.client
import time
from collections.abc import Iterator

import pytest

from tests.e2e.objectstore import BUCKET, Faults, ObjectStore, Outage, kind_of, object_store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("server") / "log", seed=14) as store:
        yield store


_SIGNED = "AWS4-HMAC-SHA256 Credential=test/20261101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


def _request(server: ObjectStore, method: str, key: str, body: bytes | None = None) -> tuple[int, bytes]:
    host, port = server.proxy.server_address[:2]
    connection = http.client.HTTPConnection(str(host), int(port), timeout=30)
    try:
        # The server checks that a request is signed, and not by whom.
        connection.request(method, f"/{BUCKET}/{key}", body, {"Authorization": _SIGNED})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_without_faults_the_proxy_passes_everything_on_and_counts_it(server: ObjectStore) -> None:
    server.proxy.start_again()
    data = bytes(range(256)) * 100
    assert _request(server, "PUT", "store/plan/a", data)[0] == 200
    assert _request(server, "GET", "store/plan/a") == (200, data)
    assert _request(server, "HEAD", "store/plan/a") == (200, b"")
    assert _request(server, "GET", "store/plan/b")[0] == 404
    assert _request(server, "DELETE", "store/plan/a")[0] == 204
    assert server.proxy.requests == {"PUT": 1, "GET": 2, "HEAD": 1, "DELETE": 1}
    assert server.proxy.by_kind == {"PUT plan": 1, "GET plan": 2, "HEAD plan": 1, "DELETE plan": 1}
    assert not server.proxy.injected


def test_each_fault_is_what_its_name_says(server: ObjectStore) -> None:
    data = b"x" * 10_000
    server.proxy.start_again()
    assert _request(server, "PUT", "fault/a", data)[0] == 200
    for fault, status, code in (
        ("internal_error", 500, b"InternalError"),
        ("slow_down", 503, b"SlowDown"),
        ("denied", 403, b"AccessDenied"),
    ):
        server.proxy.start_again(Faults(**{fault: 1.0}))
        answer = _request(server, "PUT", f"fault/{fault}", data)
        assert answer[0] == status
        assert b"<Code>" + code in answer[1]
    for fault in ("reset", "lost"):
        server.proxy.start_again(Faults(**{fault: 1.0}))
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            _request(server, "PUT", f"fault/{fault}", data)
    server.proxy.start_again(Faults(truncated=1.0))
    with pytest.raises(http.client.IncompleteRead, match="5000 bytes read, 5000 more expected"):
        _request(server, "GET", "fault/a")
    server.proxy.start_again(Faults(slow=1.0, slow_seconds=0.2))
    started = time.monotonic()
    assert _request(server, "GET", "fault/a") == (200, data)
    assert time.monotonic() - started >= 0.2
    assert server.objects("fault/").keys() == {"a", "lost"}, "only a lost answer's request is done"
    assert server.proxy.injected == {"slow": 1}


def test_faults_follow_from_the_seed_and_outages_end(server: ObjectStore) -> None:
    faults = Faults(internal_error=0.2, slow_down=0.1)
    sequences = []
    for _ in range(2):
        server.proxy.start_again(faults)
        sequences.append([server.proxy.draw("GET", f"/b/{n % 7}") for n in range(300)])
    assert sequences[0] == sequences[1]
    assert 30 <= sequences[0].count("internal_error") <= 90
    assert 10 <= sequences[0].count("slow_down") <= 50
    server.proxy.start_again(outages=(Outage("^PUT /b/x", "denied", 2),))
    assert [server.proxy.draw("PUT", "/b/x") for _ in range(4)] == ["denied", "denied", "", ""]
    assert server.proxy.draw("GET", "/b/x") == ""


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("/b/out/features.zarr/features/c/0/0/0/0", "features.zarr data"),
        ("/b/out/features.zarr/zarr.json", "features.zarr metadata"),
        ("/b/out/ledger/000000/000000001.json", "ledger"),
        ("/b?list-type=2&prefix=out%2F", "list"),
        ("/b/", "bucket"),
        ("/b/in/a.tar", "a.tar"),
    ],
)
def test_requests_are_counted_by_kind_of_object(target: str, kind: str) -> None:
    assert kind_of(target) == kind

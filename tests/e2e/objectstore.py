"""An S3 server on this machine, and a proxy before it that answers a share of the requests with faults.

The server is moto's, in a process of its own. Jobs reach it, through the proxy, by the environment variables of
:meth:`ObjectStore.environment`, as they would reach any S3-compatible store.
"""

import http.client
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.e2e import support

BUCKET = "featup"
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "date", "server"})
_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>'
    "<RequestId>injected</RequestId></Error>"
)


@dataclass(frozen=True)
class Faults:
    """Shares of the requests, from 0 to 1, that meet each fault; their sum is at most 1.

    ``internal_error`` is answered 500, ``slow_down`` 503 with S3's code SlowDown, and ``denied`` 403 with AccessDenied,
    each without the request being done. ``reset`` closes the connection before the request is done; ``lost`` does the
    request and closes the connection instead of answering. ``slow`` waits ``slow_seconds`` before it answers.
    ``truncated`` announces the whole body and sends half of it; only bodies that are answers to GET can be.
    """

    internal_error: float = 0.0
    slow_down: float = 0.0
    denied: float = 0.0
    reset: float = 0.0
    lost: float = 0.0
    slow: float = 0.0
    truncated: float = 0.0
    slow_seconds: float = 0.5

    def choose(self, number: float) -> str:
        """The fault that a number from 0 to 1 stands for, or ``""``."""
        for field in fields(self):
            if field.name != "slow_seconds":
                share = getattr(self, field.name)
                if number < share:
                    return field.name
                number -= share
        return ""


@dataclass(frozen=True)
class Outage:
    """A fault that each of certain requests meets the first ``times`` times: more often than the client tries again.

    ``pattern`` is searched for in "METHOD /bucket/key?query"; ``fault`` is one of :class:`Faults`.
    """

    pattern: str
    fault: str
    times: int


class FaultProxy(ThreadingHTTPServer):
    """A reverse proxy on 127.0.0.1 that counts requests and injects faults.

    Whether a request meets a fault depends on the seed, its method, its path and query, and how often these were asked
    for before: the order in which processes send their requests does not matter.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, backend: tuple[str, int], faults: Faults = Faults(), seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = backend
        self.faults = faults
        self.outages: tuple[Outage, ...] = ()
        """Outages, which come before the faults by chance."""
        self.seed = seed
        self.requests: Counter[str] = Counter()
        """Requests by method."""
        self.injected: Counter[str] = Counter()
        """Faults by name."""
        self.by_kind: Counter[str] = Counter()
        """Requests by method and kind of object: the first folder below the store, see :func:`kind_of`."""
        self._occurrences: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Address of the proxy."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self, method: str, target: str) -> str:
        """Count a request, and name the fault it meets, or ``""``."""
        with self._lock:
            request = f"{method} {target}"
            self._occurrences[request] += 1
            number = random.Random(f"{self.seed} {request} {self._occurrences[request]}").random()
            fault = self.faults.choose(number)
            for outage in self.outages:
                if re.search(outage.pattern, request) and self._occurrences[request] <= outage.times:
                    fault = outage.fault
            self.requests[method] += 1
            self.by_kind[f"{method} {kind_of(target)}"] += 1
            if fault:
                self.injected[fault] += 1
            return fault

    def start_again(self, faults: Faults = Faults(), outages: tuple[Outage, ...] = ()) -> None:
        """Count from nothing, as if no request had come yet, and inject these faults from now on."""
        with self._lock:
            self.faults, self.outages = faults, outages
            self._occurrences.clear()
            self.requests.clear()
            self.injected.clear()
            self.by_kind.clear()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in mid-request are what these tests are about; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def kind_of(target: str) -> str:
    """What an S3 request is about: ``list``, ``bucket``, or the folder of a store or of the inputs it lies in."""
    path, _, query = target.partition("?")
    if "list-type" in query or "prefix=" in query:
        return "list"
    folders = path.strip("/").split("/")
    if len(folders) < 2 or not folders[1]:
        return "bucket"
    below = folders[2] if len(folders) > 2 else folders[1]
    if below == "features.zarr":
        return f"{below} data" if "/c/" in path else f"{below} metadata"
    return below


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy
    # A killed client must not hold a thread for ever.
    timeout = 120
    # Answer and body would otherwise wait for one another's acknowledgement (Nagle's algorithm), 40 ms each.
    disable_nagle_algorithm = True

    def _forward(self) -> None:
        fault = self.server.draw(self.command, self.path)
        body = self._body()
        if fault == "internal_error":
            self._refuse(500, "InternalError", "We encountered an internal error. Please try again.")
        elif fault == "slow_down":
            self._refuse(503, "SlowDown", "Please reduce your request rate.")
        elif fault == "denied":
            self._refuse(403, "AccessDenied", "Access Denied")
        elif fault == "reset":
            self._reset()
        else:
            if fault == "slow":
                time.sleep(self.server.faults.slow_seconds)
            status, headers, data = self._ask(body)
            if fault == "lost":
                self._reset()
                return
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if self.command == "HEAD":
                self.end_headers()
                return
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "truncated" and self.command == "GET":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            else:
                self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's answer: status, headers (HEAD's length among them), body."""
        connection = http.client.HTTPConnection(*self.server.backend, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "expect", "connection"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            left_out = _HOP_BY_HOP if self.command == "HEAD" else _HOP_BY_HOP | {"content-length"}
            return answer.status, [h for h in answer.getheaders() if h[0].lower() not in left_out], data
        finally:
            connection.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        data = b"" if self.command == "HEAD" else _ERROR.format(code=code, message=message).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        # Without lingering, closing sends RST, which the client sees as "connection reset by peer".
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        with suppress(OSError, ValueError):  # the connection may be closed by now, by either side
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are counted, not printed."""


@dataclass
class ObjectStore:
    """A running S3 server with one bucket, and the proxy before it."""

    proxy: FaultProxy
    server: str
    """Address of the server itself, where there are no faults."""

    def environment(self, *, faults: bool = True) -> dict[str, str]:
        """The variables with which a job reaches the store, by way of the proxy or, without faults, directly."""
        return {
            "AWS_ENDPOINT_URL": self.proxy.url if faults else self.server,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @cached_property
    def _client(self) -> Any:
        """A client of the server itself."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.server,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test-secret",
        )

    def create_bucket(self, name: str) -> None:
        """Make a bucket."""
        self._client.create_bucket(Bucket=name)

    def buckets(self) -> list[str]:
        """Names of all buckets there are."""
        return [entry["Name"] for entry in self._client.list_buckets()["Buckets"]]

    def delete(self, key: str) -> None:
        """Remove one object."""
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def put(self, key: str, data: bytes) -> None:
        """Write one object."""
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def upload(self, path: Path, key: str) -> str:
        """Put a local file into the bucket and return its URL."""
        self.put(key, path.read_bytes())
        return f"s3://{BUCKET}/{key}"

    def objects(self, prefix: str) -> dict[str, tuple[str, float]]:
        """(ETag, seconds since 1970 when written) of all objects below a prefix that ends with ``/``, by name.

        Names are relative to the prefix.
        """
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        found = [entry for page in pages for entry in page.get("Contents", [])]
        return {e["Key"].removeprefix(prefix): (e["ETag"], e["LastModified"].timestamp()) for e in found}

    def read(self, key: str) -> bytes:
        """The bytes of one object."""
        data: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def array_files(self, prefix: str) -> dict[str, bytes]:
        """As ``support.array_files``, of a store in the bucket."""
        root = f"{prefix}/features.zarr/"
        return {name: self.read(root + name) for name in self.objects(root) if "/" in name}

    def receipts(self, prefix: str) -> dict[str, tuple[str, float]]:
        """(ETag, seconds since 1970 when written) of the receipts of a store in the bucket, by name."""
        objects = self.objects(f"{prefix}/ledger/")
        return {name: entry for name, entry in objects.items() if re.fullmatch(r"\d+/\d+\.json", name)}


@contextmanager
def object_store(log: Path, faults: Faults = Faults(), seed: int = 0) -> Iterator[ObjectStore]:
    """Start moto's S3 server and the proxy, make the bucket, and stop both at the end.

    Args:
        log: a file for what the server prints.
        faults: what the proxy injects; ``store.proxy.faults`` may be set later.
        seed: of the proxy's faults.
    """
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=support.environment() | {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"},
        )
    try:

        def port() -> re.Match[bytes] | None:
            assert server.poll() is None, f"moto's server ended: {log.read_text()[-2000:]}"
            return re.search(rb"Running on http://127\.0\.0\.1:(\d+)", log.read_bytes())

        support.wait_for(port, "moto's server", 60)
        match = port()
        assert match
        backend = ("127.0.0.1", int(match[1]))
        proxy = FaultProxy(backend, faults, seed)
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            store = ObjectStore(proxy, f"http://127.0.0.1:{backend[1]}")
            store.create_bucket(BUCKET)
            yield store
        finally:
            proxy.shutdown()
            thread.join()
            proxy.server_close()
    finally:
        server.terminate()
        server.wait(timeout=30)


__all__ = ["BUCKET", "FaultProxy", "Faults", "ObjectStore", "Outage", "kind_of", "object_store"]

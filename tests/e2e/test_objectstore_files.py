"""Files, leases and arrays on an S3 server, when its answers are faulty for longer than the client tries again.

By itself the S3 client makes five attempts, over some ten seconds. Here it is told to make one: what passes then is the
work of the pipeline's own retries.
"""

import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from s3fs import S3FileSystem

from pipeline.errors import EnvironmentFault, LeaseError
from pipeline.inputs import storage
from pipeline.store.create import create_store, declare_complete
from pipeline.store.layout import Layout, open_arrays, read_attributes
from pipeline.store.lease import Lease, holder
from tests.e2e.objectstore import BUCKET, Faults, ObjectStore, Outage, object_store

ROOT = f"s3://{BUCKET}"
DATA = bytes(range(256)) * 40
LAYOUT = Layout(
    rows=4,
    rows_per_shard=2,
    height=8,
    width=8,
    channels=3,
    tile=(8, 8),
    labels=("seg",),
    seg_dtype="uint8",
    valid_mask=False,
    compression_level=1,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """The server, which this process reaches through the proxy by its environment, as jobs do."""
    with object_store(tmp_path_factory.mktemp("server") / "log", seed=14) as store, pytest.MonkeyPatch.context() as m:
        for name, value in (store.environment() | {"AWS_MAX_ATTEMPTS": "1"}).items():
            m.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield store
        # zarr-python opens asynchronous sessions, which nobody closes: they say so when they are collected.
        S3FileSystem.clear_instance_cache()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def _list() -> list[str]:
    return storage.list_files(f"{ROOT}/list")


def _remove() -> bool:
    storage.remove(f"{ROOT}/remove/a")
    return storage.exists(f"{ROOT}/remove/a")


def _write() -> bytes:
    storage.write_atomic(f"{ROOT}/write/a", DATA, b"end")
    return storage.read_bytes(f"{ROOT}/write/a")


def _replace() -> bool:
    data, token = storage.read_with_token(f"{ROOT}/replace/a")
    return data == DATA and storage.replace_if(f"{ROOT}/replace/a", b"new", token) is not None


ACTIONS: dict[str, tuple[Callable[[], object], object]] = {
    "read": (lambda: storage.read_bytes(f"{ROOT}/read/a"), DATA),
    "fetch": (lambda: storage.fetch(f"{ROOT}/fetch/a", 3, 5000), DATA[3:5000]),
    "stat": (lambda: storage.stat(f"{ROOT}/stat/a").size, len(DATA)),
    "exists": (lambda: storage.exists(f"{ROOT}/exists/a"), True),
    "list": (_list, ["a"]),
    "write": (_write, DATA + b"end"),
    "remove": (_remove, False),
    "create": (lambda: storage.create_exclusive(f"{ROOT}/create/new", DATA), True),
    "create_refused": (lambda: storage.create_exclusive(f"{ROOT}/create_refused/a", b"other"), False),
    "replace": (_replace, True),
}


@pytest.mark.parametrize("fault", ["internal_error", "reset", "lost", "truncated"])
def test_files_outlast_the_clients_own_retries(server: ObjectStore, fault: str) -> None:
    for name in ACTIONS:
        for key in server.objects(f"{name}/"):
            server.delete(f"{name}/{key}")
        if name != "create":
            server.put(f"{name}/a", DATA)
    server.proxy.start_again(outages=(Outage(".", fault, 2),))
    with ThreadPoolExecutor(len(ACTIONS)) as pool:
        futures = {name: pool.submit(action) for name, (action, _) in ACTIONS.items()}
        results = {name: future.result() for name, future in futures.items()}
    assert results == {name: expected for name, (_, expected) in ACTIONS.items()}
    assert server.proxy.injected[fault] > 10


def test_access_denied_is_one_line_at_once(server: ObjectStore) -> None:
    server.put("denied/a", DATA)
    server.proxy.start_again(Faults(denied=1.0))
    place = f"{ROOT}/denied/a"
    for action in (
        lambda: storage.read_bytes(place),
        lambda: storage.fetch(place, 0, 10),
        lambda: storage.stat(place),
        lambda: storage.exists(place),
        lambda: storage.list_files(f"{ROOT}/denied"),
        lambda: storage.write_atomic(place, DATA),
        lambda: storage.create_exclusive(place, DATA),
        lambda: read_attributes(f"{ROOT}/denied"),
    ):
        with pytest.raises(EnvironmentFault, match="access denied") as caught:
            action()
        assert "\n" not in str(caught.value)


def test_a_bucket_that_does_not_exist_is_one_line_and_is_not_created(server: ObjectStore) -> None:
    server.proxy.start_again()
    with pytest.raises(EnvironmentFault, match="there is no bucket 'typo'"):
        storage.write_atomic("s3://typo/out/a", DATA)
    with pytest.raises(EnvironmentFault, match="there is no bucket 'typo'"), Lease.acquire("s3://typo/out"):
        pass
    assert server.buckets() == [BUCKET]


def test_of_many_contenders_one_gets_the_lease_whatever_the_answers(server: ObjectStore) -> None:
    server.proxy.start_again(Faults(internal_error=0.05, reset=0.05, lost=0.15, truncated=0.05))
    start = threading.Barrier(6)

    def contend(number: int) -> Lease | LeaseError:
        start.wait()
        try:
            return Lease.acquire(f"{ROOT}/contended", interval=0.5, stale_after=20)
        except LeaseError as error:
            return error

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(contend, range(6)))
    leases = [result for result in results if isinstance(result, Lease)]
    assert len(leases) == 1, results
    try:
        # Some heartbeats' answers are lost, and the lease stays the holder's all the same.
        for _ in range(20):
            threading.Event().wait(0.2)
            leases[0].check()
        found = holder(f"{ROOT}/contended")
        assert found is not None
        assert found.owner == leases[0].info.owner
    finally:
        leases[0].release()
    assert holder(f"{ROOT}/contended") is None
    assert server.proxy.injected["lost"] > 0


@pytest.mark.parametrize("fault", ["internal_error", "reset", "lost", "truncated"])
def test_arrays_outlast_the_clients_own_retries(server: ObjectStore, fault: str) -> None:
    url = f"{ROOT}/arrays-{fault}"
    server.proxy.start_again(outages=(Outage(r"zarr\.json$", fault, 2),))
    assert read_attributes(url) is None
    create_store(url, LAYOUT, {"identity": {}})
    declare_complete(url)
    found = read_attributes(url)
    assert found is not None
    assert found["complete"]
    arrays = open_arrays(url, ["features", "seg", "status"])
    assert np.isnan(np.asarray(arrays["features"][1])).all()
    assert (np.asarray(arrays["seg"][3]) == 255).all()
    assert server.proxy.injected[fault] > 5


def test_a_local_store_and_one_on_the_server_have_the_same_objects(server: ObjectStore, tmp_path: Path) -> None:
    server.proxy.start_again(Faults(internal_error=0.05, reset=0.05, lost=0.05, truncated=0.05))
    create_store(f"{ROOT}/same", LAYOUT, {"identity": {}})
    create_store(str(tmp_path / "same"), LAYOUT, {"identity": {}})
    root = tmp_path / "same" / "features.zarr"
    local = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    remote = {name: server.read(f"same/features.zarr/{name}") for name in server.objects("same/features.zarr/")}
    assert remote == local
    assert os.environ["AWS_ENDPOINT_URL"] == server.proxy.url

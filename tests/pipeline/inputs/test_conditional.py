import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, EnvironmentFault
from pipeline.inputs import storage
from pipeline.inputs.storage import create_exclusive, read_with_token, replace_if


@pytest.fixture(params=["path", "file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A file that does not exist, in every kind of place that has conditional writes."""
    if request.param == "s3":
        return storage.join(request.getfixturevalue("s3"), "folder/lease.json")
    start = {"path": "", "file": "file://", "memory": "memory://conditional"}[request.param]
    return f"{start}{tmp_path}/folder/lease.json"


def test_a_file_is_created_once(url: str) -> None:
    assert create_exclusive(url, b"first") is True
    assert create_exclusive(url, b"second") is False
    assert storage.read_bytes(url) == b"first"
    storage.remove(url)
    assert create_exclusive(url, b"third") is True


def test_of_many_creators_one_succeeds(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda n: create_exclusive(url, b"owner %d" % n), range(8)))
    assert sum(created) == 1
    assert storage.read_bytes(url) == b"owner %d" % created.index(True)


def test_only_the_version_that_was_read_is_replaced(url: str) -> None:
    create_exclusive(url, b"one")
    data, token = read_with_token(url)
    assert data == b"one"
    newer = replace_if(url, b"two", token)
    assert newer is not None
    assert replace_if(url, b"three", token) is None, "the token is of the version before"
    assert read_with_token(url) == (b"two", newer)
    assert replace_if(url, b"three", newer) is not None
    assert storage.read_bytes(url) == b"three"


def test_a_file_that_is_gone_is_not_replaced(url: str) -> None:
    with pytest.raises(FileNotFoundError):
        read_with_token(url)
    create_exclusive(url, b"one")
    _, token = read_with_token(url)
    storage.remove(url)
    assert replace_if(url, b"two", token) is None
    assert not storage.exists(url)


def test_of_many_who_replace_a_version_one_succeeds(url: str) -> None:
    create_exclusive(url, b"start")
    _, token = read_with_token(url)
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda n: replace_if(url, b"owner %d" % n, token), range(8)))
    (winner,) = [number for number, new in enumerate(tokens) if new is not None]
    assert read_with_token(url) == (b"owner %d" % winner, tokens[winner])


def test_files_beside_a_conditional_one_are_not_listed(url: str) -> None:
    create_exclusive(url, b"one")
    replace_if(url, b"two", read_with_token(url)[1])
    assert storage.list_files(url.removesuffix("/lease.json")) == ["lease.json"]


def _count_up(path: str, times: int) -> None:
    for _ in range(times):
        while True:
            data, token = read_with_token(path)
            if replace_if(path, b"%d" % (int(data) + 1), token) is not None:
                break


def _race(path: str, barrier: Callable[[], object], results: "multiprocessing.Queue[int]", number: int) -> None:
    barrier()
    if create_exclusive(path, b"process %d" % number):
        results.put(number)


def test_processes_lose_no_update_of_a_local_file(tmp_path: Path) -> None:
    path = str(tmp_path / "counter")
    create_exclusive(path, b"0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count_up, args=(path, 40)) for _ in range(2)]
    for process in processes:
        process.start()
    _count_up(path, 40)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert storage.read_bytes(path) == b"120"


def test_of_several_processes_one_creates_a_local_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_race, args=(str(tmp_path / "lease"), barrier.wait, results, n)) for n in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "lease").read_bytes() == b"process %d" % results.get(timeout=5)
    assert results.empty()
    assert os.listdir(tmp_path) == ["lease"], "no temporary file stays"


@pytest.mark.parametrize("scheme", ["http", "sftp", "simplecache::s3"])
def test_stores_without_conditional_writes_are_refused(scheme: str) -> None:
    for action in (
        lambda url: create_exclusive(url, b""),
        read_with_token,
        lambda url: replace_if(url, b"", "token"),
    ):
        with pytest.raises(ConfigError, match=r"has no conditional writes.*give a local folder, s3:// or gs://"):
            action(f"{scheme}://host/lease.json")


def test_a_bucket_that_does_not_exist_is_named(s3: str) -> None:
    with pytest.raises(EnvironmentFault, match="there is no bucket 'nobucket'; check its name"):
        create_exclusive("s3://nobucket/lease.json", b"x")
    with pytest.raises(EnvironmentFault, match="there is no bucket 'nobucket'; check its name"):
        replace_if("s3://nobucket/lease.json", b"x", '"etag"')

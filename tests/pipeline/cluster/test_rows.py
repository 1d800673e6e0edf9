"""Rows from Ray Data: what leaving early stops, and Ray's errors in one line."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import ray
import ray.exceptions

from pipeline.cluster.connect import connect
from pipeline.cluster.faults import ray_errors_in_one_line
from pipeline.cluster.rows import number_rows, read_rows
from pipeline.errors import InputError, JobFailedError


@pytest.fixture(scope="module")
def started_ray() -> Iterator[None]:
    connect(100)
    yield
    ray.shutdown()


def data_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("StreamingExecutor", "iter_threaded"))]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_leaving_early_ends_the_work_and_its_threads(started_ray: None) -> None:
    """They outlived the iteration, and one that met a Ray that was shut down ended the process without a word."""

    def slow(row: dict[str, int]) -> dict[str, int]:
        time.sleep(0.1)
        return row

    dataset = number_rows(50).map(slow, num_cpus=0.5)
    with suppress(InputError), read_rows(dataset) as rows:
        next(rows)
        assert data_threads()
        raise InputError("the loop ends here")
    assert data_threads() == []
    with read_rows(number_rows(5)) as rows:
        assert sorted(row["id"] for row in rows) == [0, 1, 2, 3, 4]
    assert data_threads() == []


def fail(row: dict[str, int], error: Exception) -> dict[str, int]:
    raise error


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_errors_of_workers_are_raised_as_what_they_are(started_ray: None) -> None:
    def run(error: Exception) -> None:
        dataset = number_rows(1).map(fail, fn_kwargs={"error": error}, num_cpus=0.5)
        with ray_errors_in_one_line(lambda: "3 of 7 units are done"), read_rows(dataset) as rows:
            list(rows)

    with pytest.raises(InputError, match="the tar is cut"):
        run(InputError("the tar is cut"))
    with pytest.raises(KeyError, match="a fault of ours"):
        run(KeyError("a fault of ours"))
    with pytest.raises(
        JobFailedError, match=r"^Ray ended the run: OSError: no route to host \(.*3 of 7 units are done\."
    ):
        run(OSError("no route to host"))


def test_an_error_of_ray_itself_is_one_line() -> None:
    with pytest.raises(JobFailedError) as caught, ray_errors_in_one_line(lambda: "0 of 7 units are done"):
        raise ray.exceptions.NodeDiedError("the node died\nwith details")
    assert str(caught.value).startswith(
        "Ray ended the run: the node died (NodeDiedError); 0 of 7 units are done. The log"
    )

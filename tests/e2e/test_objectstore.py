"""Whole jobs against an S3 server whose answers are faulty: 500, 503, resets, lost, slow and truncated answers."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from tests.e2e import support
from tests.e2e.in_process import run
from tests.e2e.objectstore import BUCKET, Faults, ObjectStore, Outage, object_store

OPTIONS = (*support.TINY, "--labels", "seg", "--pca", 8, "--rows-per-shard", 2, "--stride", 16)
SHARDS = "train-{0000..0001}.tar"
SAMPLES = 21
FAULTS = Faults(internal_error=0.03, slow_down=0.02, reset=0.03, lost=0.03, slow=0.02, truncated=0.03)
# Reads a store as training does and prints a digest of its samples.
READER = """
import hashlib, sys
from pipeline.loader.dataset import FeatureDataset
dataset = FeatureDataset(sys.argv[1], ["features", "seg"])
digest = hashlib.sha256()
for sample in dataset:
    for name in ("features", "seg", "row"):
        digest.update(sample[name].numpy().tobytes())
print(len(dataset), digest.hexdigest())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("server") / "log", seed=14) as store:
        yield store


@pytest.fixture(scope="module")
def shards(server: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input, on disk and, below ``in/``, on the server."""
    folder = tmp_path_factory.mktemp("shards")
    for tar, count in enumerate((11, 10)):
        samples = [support.good_sample(f"img{tar}{n:02d}", 20 * tar + n) for n in range(count)]
        members = [member for sample in samples for member in sample]
        path = support.write_tar(folder / f"train-{tar:04d}.tar", members)
        server.upload(path, f"in/{path.name}")
    return folder


@pytest.fixture(scope="module")
def on_disk(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("disk") / "out"
    run("precompute", "--shards", shards / SHARDS, "--out", out, *OPTIONS)
    return out


def _read(url: object, server: ObjectStore) -> str:
    """What :data:`READER` prints of a store."""
    done = subprocess.run(
        [sys.executable, "-c", READER, str(url)],
        cwd=support.ROOT,
        env=support.environment() | server.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_job_on_a_faulty_object_store_is_killed_resumed_and_gives_the_bytes_of_one_on_disk(
    server: ObjectStore, on_disk: Path, tmp_path: Path
) -> None:
    command = ("--shards", f"s3://{BUCKET}/in/{SHARDS}", "--out", f"s3://{BUCKET}/out", *OPTIONS)
    variables = server.environment()
    server.proxy.start_again(FAULTS)
    job = support.start("precompute", *command, log=tmp_path / "log", variables=variables)
    try:
        support.wait_for(lambda: len(server.receipts("out")) >= 2 or job.poll() is not None, "two receipts", 200)
    finally:
        job.kill()
        job.wait(timeout=60)
    assert 2 <= len(server.receipts("out")) < 11, (tmp_path / "log").read_text()[-5000:]
    text = support.run("precompute", *command, variables=variables)
    assert f"input {SAMPLES} = ok {SAMPLES} + failed 0" in text
    assert "0 units done before" not in text
    assert server.array_files("out") == support.array_files(on_disk)
    assert f"{SAMPLES} samples = {SAMPLES} ok + 0 failed" in support.run(
        "verify", f"s3://{BUCKET}/out", variables=variables
    )
    status = support.run("status", f"s3://{BUCKET}/out", variables=variables)
    assert "11 of 11" in status, status
    digest = _read(f"s3://{BUCKET}/out", server)
    assert digest.startswith(f"{SAMPLES} ")
    assert digest == _read(on_disk, server)
    print(f"requests {dict(server.proxy.requests)}, faults {dict(server.proxy.injected)}")
    print(f"by kind of object {dict(server.proxy.by_kind)}")
    names = {field.name for field in fields(FAULTS) if field.name not in ("slow_seconds", "denied")}
    assert server.proxy.injected.keys() == names, "not every kind of fault was met"


@pytest.mark.ray
def test_outages_longer_than_the_client_tries_again_are_waited_out(server: ObjectStore, on_disk: Path) -> None:
    """The S3 client is told to make one attempt: what passes is the work of the pipeline's own retries."""
    out = f"/{BUCKET}/waited/"
    server.proxy.start_again(
        outages=(
            Outage(f"^PUT {out}features.zarr/features/c/1/", "internal_error", 3),
            Outage(f"^PUT {out}ledger/000000/000000002.json", "reset", 3),
            Outage(f"^(GET|HEAD) {out}features.zarr/features/zarr.json", "lost", 2),
            Outage(f"^GET /{BUCKET}/in/train-0001.tar", "truncated", 3),
        )
    )
    command = ("--shards", f"s3://{BUCKET}/in/{SHARDS}", "--out", f"s3://{BUCKET}/waited", *OPTIONS)
    text = support.run("precompute", *command, variables=server.environment() | {"AWS_MAX_ATTEMPTS": "1"})
    assert f"input {SAMPLES} = ok {SAMPLES} + failed 0" in text
    assert {"internal_error", "reset", "lost", "truncated"} <= server.proxy.injected.keys()
    assert server.array_files("waited") == support.array_files(on_disk)

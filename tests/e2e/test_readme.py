"""Every block of README runs as it stands: commands in a shell, Python as a script, listings against the files.

Blocks run in one folder, in an order in which each finds what it reads (see ``blocks.in_order``). The test provides
what README takes for granted: photographs, shards, weights in the hub's cache, and for the cluster an S3 server.
Three things differ from a user's machine: ``make`` only prints its commands (the tests would run themselves), ``pip``
has no index (it finds that this project is installed), and the cluster has ports of its own.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.e2e import support
from tests.e2e.objectstore import object_store
from tests.e2e.readme.blocks import Block, in_order, read_blocks, run
from tests.e2e.readme.cluster import own_cluster
from tests.e2e.readme.folder import command_path, make_files, make_hub
from tests.e2e.readme.listings import absent_entries, entries

BLOCKS = read_blocks((support.ROOT / "README.md").read_text(encoding="utf-8"))
CLUSTER = [block for block in BLOCKS if "ray start" in block.text]
# Listings of what commands write; the other listing is the checkout's.
TREES = [block for block in BLOCKS if block.language == "text" and block.text.startswith("featup/")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    make_files(path)
    return path


@pytest.fixture(scope="module")
def environment(hub: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    variables = support.environment() | hub
    variables["PATH"] = command_path(tmp_path_factory.mktemp("bin"), variables["PATH"])
    # Threads that wait must not spin: other tests run beside these.
    variables["OMP_WAIT_POLICY"] = "PASSIVE"
    return variables | {"MAKEFLAGS": "n", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def failed() -> set[str]:
    """What blocks should have made that failed."""
    return set()


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "python", "text"}, [
        f"README.md:{block.line}: {block.language!r}"
        for block in BLOCKS
        if block.language not in ("sh", "python", "text")
    ]
    assert len(CLUSTER) == len(TREES) == 1
    lacking = {place for block in BLOCKS for place in block.reads} - {
        place for block in BLOCKS for place in block.makes
    }
    assert not lacking, f"no block of README makes {lacking} by --out"


@pytest.mark.parametrize("block", in_order([one for one in BLOCKS if one not in (*CLUSTER, *TREES)]), ids=str)
def test_block(block: Block, folder: Path, environment: dict[str, str], failed: set[str]) -> None:
    missing = block.reads & failed
    failed |= block.makes
    if missing:
        pytest.skip(f"the block that makes {', '.join(sorted(missing))} failed")
    if block.language == "text":
        assert not absent_entries(block, folder)
        return
    printed = run(block, folder, environment)
    for place in block.makes:
        assert (folder / place).exists(), f"README.md:{block.line}: {place} was not made; printed:\n{printed[-3000:]}"
    failed -= block.makes


def test_the_tree_is_that_of_the_checkout() -> None:
    (tree,) = TREES
    assert len(list(entries(tree))) > 30
    assert not absent_entries(tree, support.ROOT)


@pytest.fixture(scope="module")
def bucket(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An S3 server with README's bucket and the shards in it; the variables with which it is reached."""
    with object_store(tmp_path_factory.mktemp("server") / "log") as server:
        server.create_bucket("bucket")
        variables = server.environment(faults=False)
        files = s3fs.S3FileSystem(**_keys(variables), skip_instance_cache=True, use_listings_cache=False)
        for path in (folder / "data").glob("train-*.tar"):
            files.put_file(str(path), f"bucket/{path.name}")
        yield variables


def test_the_clusters_block_and_a_submission_that_fails(
    folder: Path, environment: dict[str, str], bucket: dict[str, str], tmp_path: Path
) -> None:
    with own_cluster(tmp_path) as cluster:
        variables = environment | bucket | cluster.environment
        printed = run(cluster.adapt(CLUSTER[0]), folder, variables)
        assert "input 10 = ok 10 + failed 0" in printed, printed[-4000:]
        assert "succeeded" in printed
        files = s3fs.S3FileSystem(**_keys(bucket), skip_instance_cache=True, use_listings_cache=False)
        assert files.exists("bucket/features/train/features.zarr/zarr.json")
        submit = ["ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", "python", "-m"]
        done = subprocess.run(
            [*submit, "jobs.precompute", "--shards", "s3://bucket/none.tar", "--out", "s3://bucket/bad", *support.TINY],
            cwd=folder,
            env=variables | {"RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        text = done.stdout + done.stderr
        assert done.returncode != 0, text[-4000:]
        assert "none.tar" in text


def _keys(bucket: dict[str, str]) -> dict[str, str]:
    return {
        "key": bucket["AWS_ACCESS_KEY_ID"],
        "secret": bucket["AWS_SECRET_ACCESS_KEY"],
        "endpoint_url": bucket["AWS_ENDPOINT_URL"],
    }

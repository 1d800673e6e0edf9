import os
from pathlib import Path

import pytest

from pipeline.errors import InputChangedError
from pipeline.inputs import storage
from pipeline.inputs.changes import check_unchanged
from pipeline.inputs.plan import plan_shard
from tests.pipeline.inputs.tars import tar_bytes, three


@pytest.fixture(params=["path", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        s3: str = request.getfixturevalue("s3")
        return s3
    return {"path": f"{tmp_path}", "memory": f"memory://test_changes{tmp_path}"}[request.param]


def test_a_shard_that_is_rewritten_with_the_same_size_is_named(folder: str, tmp_path: Path) -> None:
    # The bytes of both versions were mixed in one store, and the job ended well.
    url = storage.join(folder, "a.tar")
    data = tar_bytes(three())
    storage.write_atomic(url, data)
    shard = plan_shard(url, str(tmp_path / "index"))
    check_unchanged(shard)
    storage.write_atomic(url, data.replace(b"\1" * 100, b"\2" * 100))
    if storage.is_local(url):
        os.utime(url, ns=(0, int(shard.stamp) + 1))
    with pytest.raises(InputChangedError, match=r"a\.tar changed while the job ran \(written again.*run the same com"):
        check_unchanged(shard)


def test_a_shard_of_another_size_or_gone_is_named(folder: str, tmp_path: Path) -> None:
    url = storage.join(folder, "a.tar")
    storage.write_atomic(url, data := tar_bytes(three()))
    shard = plan_shard(url, str(tmp_path / "index"))
    storage.write_atomic(url, data + bytes(512))
    with pytest.raises(InputChangedError, match=rf"a\.tar changed .*{len(data) + 512} bytes now, {len(data)} when"):
        check_unchanged(shard)
    storage.remove(url)
    with pytest.raises(InputChangedError, match=r"a\.tar is gone since the plan was made; put it back"):
        check_unchanged(shard)

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.errors import InputChangedError, SampleError
from pipeline.inputs import storage
from pipeline.inputs.changes import check_unchanged, compare_bytes
from pipeline.inputs.plan import plan_shard
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import ShardIndex, index_tar
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


def hashes_of(index: ShardIndex) -> dict[int, list[str]]:
    """What the receipts of all samples hold: the sha256 of image and class map."""
    return {
        position: [hashlib.sha256(sample[ext]).hexdigest() for ext in ("jpg", "seg.png")]
        for position, sample in enumerate(read_samples(index, 0, len(index.samples)))
        if not isinstance(sample, SampleError)
    }


def test_equal_bytes_are_found_equal_and_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(three(200, 30_000)))
    index = index_tar(str(tmp_path / "a.tar"))
    hashes = hashes_of(index)
    compare_bytes(index, hashes, lambda ext: ext != "cls")
    read: list[int] = []

    def counting(url: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return storage.read_range(url, start, stop)

    compare_bytes(index, {3: hashes[3], 7: [], 100: hashes[100]}, read=counting)
    assert len(read) == 2
    assert sum(read) < 3 * 35_000


@pytest.mark.parametrize(("ext", "position"), [("jpg", 2), ("seg.png", 3)])
def test_other_bytes_under_the_same_headers_are_found_and_named(tmp_path: Path, ext: str, position: int) -> None:
    # A rewrite may leave names, sizes and header times as they were: it was mixed into the store in silence.
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(three()))
    index = index_tar(str(path))
    hashes = hashes_of(index)
    changed = [(name, b"!" * len(data) if name == f"000{position}.{ext}" else data) for name, data in three()]
    path.write_bytes(tar_bytes(changed))
    assert index_tar(str(path)).digest == index.digest
    with pytest.raises(InputChangedError, match=rf"a\.tar: sample 000{position} has other bytes than when the store"):
        compare_bytes(index_tar(str(path)), hashes)


def test_samples_that_are_there_no_more_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data := tar_bytes(three()))
    hashes = hashes_of(index_tar(str(path)))
    path.write_bytes(data[:8000])
    with pytest.raises(InputChangedError, match=r"a\.tar: sample 0002 cannot be read any more \(tar_truncated"):
        compare_bytes(index_tar(str(path)), {2: hashes[2]})
    with pytest.raises(InputChangedError, match=r"a\.tar holds 3 samples, and the store was made from 4 of it"):
        compare_bytes(index_tar(str(path)), {3: hashes[3]})

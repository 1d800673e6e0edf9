import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from pipeline.errors import InputError, Reason, SampleError
from pipeline.inputs import storage
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import BLOCK, index_tar
from tests.pipeline.inputs.tars import FORMATS, by_webdataset, iterate_tar, members_of, tar_bytes, three


def samples_in(data: bytes) -> list[dict[str, bytes]]:
    """What `three` put in, by key order, as tarfile reads it."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            stream = tar.extractfile(info)
            assert stream is not None
            key, _, ext = info.name.partition(".")
            found.setdefault(key, {})[ext] = stream.read()
    return list(found.values())


class Recorder:
    """A range reader that remembers its requests, and fails at some of them."""

    def __init__(self, failures: dict[int, Exception] | None = None) -> None:
        self.requests: list[tuple[int, int]] = []
        self.failures = failures or {}

    def __call__(self, url: str, start: int, stop: int) -> bytes:
        self.requests.append((start, stop))
        failure = self.failures.get(len(self.requests))
        if failure is not None:
            raise failure
        return storage.read_range(url, start, stop)


def test_a_shard_by_webdataset_reads_as_webdataset_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "written.tar"
    random = np.random.default_rng(0)
    with wds.TarWriter(str(path)) as sink:
        for i in range(20):
            sink.write(
                {
                    "__key__": f"folder/{i:06d}",
                    "jpg": random.bytes(int(random.integers(1, 5000))),
                    "seg.png": random.bytes(int(random.integers(0, 1100))),
                    "cls": str(i).encode(),
                }
            )
    expected = by_webdataset(path)
    assert len(expected) == 20
    assert list(iterate_tar(str(path))) == expected


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS.keys())
def test_odd_names_read_as_webdataset_reads_them(tmp_path: Path, kind: int) -> None:
    names = [
        "./a.JPG", "./a.seg.png", "__meta__/x.jpg", "b.jpg", "b", "__note__", "b.cls", "d.e/c.jpg",
        "d.e/.hidden",
        "d/.b.jpg", ".hidden.jpg", "p" * 120 + "/q.jpg", "tür/東.jpg", "last.",
    ]  # fmt: skip
    path = tmp_path / "odd.tar"
    path.write_bytes(tar_bytes([(name, name.encode() * 40) for name in names], kind))
    expected = by_webdataset(path)
    assert [key for key, _ in expected] == ["./a", "b", "d.e/c", "d/", "p" * 120 + "/q", "tür/東", "last"]
    assert list(iterate_tar(str(path))) == expected


def test_real_shards_read_as_webdataset_reads_them(shared: Path) -> None:
    for name in ("camvid/val-0000.tar", "imagenet_sample/0003.tar", "rgbd/val-0000.tar"):
        path = shared / "data" / name
        assert list(iterate_tar(str(path))) == by_webdataset(path)


def test_near_members_come_by_one_request(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data := tar_bytes(three(10)))
    index = index_tar(str(path))
    recorder = Recorder()
    assert read_samples(index, 2, 7, read=recorder) == samples_in(data)[2:7]
    members = members_of(data)
    assert recorder.requests == [(members[6].offset, members[20].offset_data + 1)]


def test_gaps_are_read_through_up_to_a_mebibyte(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 900_000, "c": 10, "d": 1_200_000, "e": 10}
    path = tmp_path / "a.tar"
    path.write_bytes(
        tar_bytes([(f"k.{ext}" if ext in "bd" else f"k.x{ext}", bytes(size)) for ext, size in sizes.items()])
    )
    recorder = Recorder()
    (sample,) = read_samples(index_tar(str(path)), 0, 1, lambda ext: ext.startswith("x"), read=recorder)
    assert sample == {"xa": bytes(10), "xc": bytes(10), "xe": bytes(10)}
    assert len(recorder.requests) == 2
    assert sum(stop - start for start, stop in recorder.requests) < 1_000_000


def test_long_members_come_by_requests_of_bounded_length(tmp_path: Path) -> None:
    path = tmp_path / "long.tar"
    sizes = [70 << 20, 3, 40 << 20, 40 << 20]
    with path.open("wb") as stream:
        for i, size in enumerate(sizes):
            info = tarfile.TarInfo(f"{i}.bin")
            info.size = size
            stream.write(info.tobuf())
            start = stream.tell()
            stream.write(b"%d" % i)
            stream.seek(start + size - 1)
            stream.write(b"e")
            stream.seek(start + (size + BLOCK - 1) // BLOCK * BLOCK)
        stream.write(bytes(2 * BLOCK))
    recorder = Recorder()
    samples = read_samples(index_tar(str(path)), 0, 4, read=recorder)
    assert max(stop - start for start, stop in recorder.requests) == 64 << 20
    for i, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        assert isinstance(sample, dict)
        assert (len(sample["bin"]), sample["bin"][:1], sample["bin"][-1:]) == (size, b"%d" % i, b"e")


def test_nothing_wanted_and_no_samples_read_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(three(3)))
    recorder = Recorder()
    index = index_tar(str(path))
    assert read_samples(index, 0, 3, lambda ext: ext == "none", read=recorder) == [{}, {}, {}]
    assert read_samples(index, 3, 3, read=recorder) == []
    assert recorder.requests == []


@pytest.mark.parametrize(
    "error",
    [OSError("input/output error"), ConnectionResetError("reset"), TimeoutError("slow"), EOFError("cut")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_passes_gives_the_same_bytes(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data := tar_bytes(three(6)))
    recorder = Recorder({1: error})
    assert read_samples(index_tar(str(path)), 0, 6, read=recorder) == samples_in(data)
    assert len(recorder.requests) == 2
    assert recorder.requests[0] == recorder.requests[1]


def test_an_error_in_the_middle_of_a_member_reads_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "long.tar"
    content = np.random.default_rng(0).bytes(65 << 20)
    path.write_bytes(tar_bytes([("a.bin", content)]))
    recorder = Recorder({2: OSError("cut in mid-read")})
    assert read_samples(index_tar(str(path)), 0, 1, read=recorder) == [{"bin": content}]
    assert len(recorder.requests) == 3


def test_samples_with_a_problem_come_back_as_errors_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    files = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("c.jpg", bytes(9000))]
    path.write_bytes(tar_bytes(files)[:9000])
    recorder = Recorder()
    results = read_samples(index_tar(str(path)), 0, 4, read=recorder)
    assert results[:2] == [{"jpg": b"1"}, {"jpg": b"2"}]
    assert [error.reason for error in results[2:] if isinstance(error, SampleError)] == [
        Reason.REPEATED_KEY,
        Reason.TAR_TRUNCATED,
    ]
    assert len(recorder.requests) == 1
    assert recorder.requests[0][1] == 3 * BLOCK + 1


def test_cut_anywhere_exactly_the_samples_whole_before_the_cut_come_out(tmp_path: Path) -> None:
    files = [(f"{i:04d}.jpg", bytes([i + 1]) * (300 + 200 * i)) for i in range(8)]
    data = tar_bytes(files)
    members = members_of(data)
    path = tmp_path / "cut.tar"
    for cut in sorted({c + d for c in range(0, len(data), BLOCK) for d in (0, 1, 300, 511)}):
        path.write_bytes(data[:cut])
        whole = [
            (info.name[:4], {"jpg": content})
            for info, (_, content) in zip(members, files, strict=True)
            if info.offset_data + info.size <= cut
        ]
        assert list(iterate_tar(str(path))) == whole, cut


def test_a_tar_replaced_after_indexing_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    files = three(4)
    path.write_bytes(tar_bytes(files))
    index = index_tar(str(path))
    match = "a.tar.*not the one that was indexed.*Run the job again"
    # Same names and sizes in another order of samples: only the names in the headers differ.
    path.write_bytes(tar_bytes([(name.replace("0002", "0009"), data) for name, data in files]))
    with pytest.raises(InputError, match=match):
        read_samples(index, 0, 4)
    assert len(read_samples(index, 0, 2)) == 2
    path.write_bytes(tar_bytes([("first.jpg", b"more"), *files]))
    with pytest.raises(InputError, match=match):
        read_samples(index, 0, 4)


def test_a_tar_that_shrank_or_went_after_indexing_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(three(4)))
    index = index_tar(str(path))
    os.truncate(path, 2000)
    with pytest.raises(InputError, match=r"2000 bytes where .* it became shorter since it was indexed.*again"):
        read_samples(index, 0, 4)
    path.unlink()
    with pytest.raises(InputError, match="gone since it was indexed"):
        read_samples(index, 0, 4)


def test_samples_that_the_index_does_not_have_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(three(4)))
    with pytest.raises(InputError, match=r"samples 2 to 5 of .* its index holds 4"):
        read_samples(index_tar(str(path)), 2, 5)


def test_a_remote_tar_reads_as_a_local_one() -> None:
    url = "memory://test_read/a.tar"
    data = tar_bytes(three(5))
    storage.write_atomic(url, data)
    assert [sample for _, sample in iterate_tar(url)] == samples_in(data)

import bz2
import gzip
import lzma
import random
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import InputError, Reason
from pipeline.inputs.tar import BLOCK, index_tar
from tests.pipeline.inputs.tars import (
    index_bytes,
    layout,
    members_of,
    tar_bytes,
    three,
)


def test_missing_empty_and_foreign_files_are_faults_without_samples(tmp_path: Path) -> None:
    missing = index_tar(str(tmp_path / "none.tar"))
    assert (missing.size, missing.samples) == (-1, ())
    assert missing.faults[0].startswith("missing: ")
    tar = tar_bytes(three())
    noise = random.Random(0).randbytes(5000)
    for content, fault in [
        (b"", "empty: the file has no bytes"),
        (bytes(10240), "empty: the file is 10240 zero bytes"),
        (bytes(100), "empty: the file is 100 zero bytes"),
        (tar_bytes([("README", b"no sample")]), "empty: the tar holds no file"),
        (
            gzip.compress(tar),
            "compressed: seeking is impossible in a file compressed with gzip; store the tar unc",
        ),
        (bz2.compress(tar), "compressed: seeking is impossible in a file compressed with bzip2"),
        (lzma.compress(tar), "compressed: seeking is impossible in a file compressed with xz"),
        (noise, "not a tar: "),
        (b"<html>404</html>", "not a tar: "),
    ]:
        index = index_bytes(tmp_path, content)
        assert index.samples == ()
        assert index.faults[0].startswith(fault), index.faults
        assert index.size == len(content)


def test_a_folder_in_place_of_a_tar_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read .* not a folder"):
        index_tar(str(tmp_path))


def test_an_archive_without_end_mark_is_noted_and_loses_nothing(tmp_path: Path) -> None:
    data = tar_bytes(three())
    last = members_of(data)[-1]
    index = index_bytes(tmp_path, data[: last.offset_data + BLOCK])
    assert layout(index) == layout(index_bytes(tmp_path, data))
    assert len(index.faults) == 1
    assert index.faults[0].startswith("no end-of-archive mark: ")


def test_a_long_tail_of_zeros_is_an_unfinished_copy(tmp_path: Path) -> None:
    data = tar_bytes(three())
    index = index_bytes(tmp_path, data + bytes(2 << 20))
    assert len(index.samples) == 4
    assert "probably a copy that was not finished" in index.faults[0]


def test_cut_anywhere_only_what_lies_behind_the_cut_is_lost(tmp_path: Path) -> None:
    # Long names, so that cuts also meet header extensions.
    files = [(f"{'long' * 30}{name}", data) for name, data in three(3)]
    data = tar_bytes(files)
    members = members_of(data)
    end = members[-1].offset_data + BLOCK
    cuts = [*range(0, end + BLOCK, BLOCK), *(c + d for c in range(0, end, BLOCK) for d in (1, 511))]
    for cut in cuts:
        index = index_bytes(tmp_path, data[:cut])
        expected: dict[str, tuple[list[str], bool]] = {}
        for info in members:
            if cut >= info.offset_data:
                key, _, ext = info.name.partition(".")
                exts, whole = expected.get(key, ([], True))
                expected[key] = ([*exts, ext], whole and cut >= info.offset_data + info.size)
        assert layout(index) == [(key, exts) for key, (exts, _) in expected.items()], cut
        for sample, (_, whole) in zip(index.samples, expected.values(), strict=True):
            assert (sample.problem is None) == whole, cut
            assert whole or (sample.problem and sample.problem[0] == Reason.TAR_TRUNCATED), cut
        assert bool(index.faults) == (cut <= end), cut
        at_member = cut in [info.offset for info in members[1:]] or cut == end
        if cut <= end:
            kinds = {fault.partition(":")[0] for fault in index.faults}
            kind = "no end-of-archive mark" if at_member else "truncated" if cut >= BLOCK else "not a tar"
            assert (kind if cut else "empty") in kinds, (cut, index.faults)


def damaged(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + b"\xa5" * (stop - start) + data[stop:]


@pytest.mark.parametrize("position", range(12))
def test_a_damaged_header_costs_its_member_alone(tmp_path: Path, position: int) -> None:
    data = tar_bytes(three())
    members = members_of(data)
    lost = members[position]
    index = index_bytes(tmp_path, damaged(data, lost.offset, lost.offset + 100))
    kept = [info for info in members if info is not lost]
    assert [m.offset for s in index.samples for m in s.members] == [info.offset_data for info in kept]
    stop = members[position + 1].offset if position < 11 else len(data)
    assert index.faults == (f"damaged: bytes {lost.offset} to {stop} hold no valid header; members there are lost",)


def test_damage_longer_than_a_search_step_is_passed_over(tmp_path: Path) -> None:
    files = [("a.jpg", b"a" * 3_000_000), ("b.jpg", b"b" * 10), ("c.jpg", b"c" * 10)]
    data = tar_bytes(files)
    b, c = members_of(data)[1:]
    index = index_bytes(tmp_path, damaged(data, 0, b.offset + 100))
    assert layout(index) == [("c", ["jpg"])]
    assert index.faults == (f"damaged: bytes 0 to {c.offset} hold no valid header; members there are lost",)


def test_headers_off_the_block_grid_are_data(tmp_path: Path) -> None:
    inner = tar_bytes([("inner.jpg", b"no member of this tar")])
    data = tar_bytes([("a.jpg", b"a"), ("b.bin", b"-" * 100 + inner), ("c.jpg", b"c")])
    lost = members_of(data)[1]
    index = index_bytes(tmp_path, damaged(data, lost.offset, lost.offset + 100))
    assert layout(index) == [("a", ["jpg"]), ("c", ["jpg"])]


def test_zeros_between_members_do_not_end_the_archive(tmp_path: Path) -> None:
    first, second = tar_bytes([("a.jpg", b"a")]), tar_bytes([("b.jpg", b"b")])
    index = index_bytes(tmp_path, first + second)
    assert layout(index) == [("a", ["jpg"]), ("b", ["jpg"])]
    assert index.faults == (
        f"damaged: bytes 1024 to {len(first)} are zero and more follows; either members are lost there, or "
        "two tars were joined",
    )


def test_a_damaged_header_extension_puts_its_member_in_doubt(tmp_path: Path) -> None:
    def with_extension(info: tarfile.TarInfo) -> None:
        if info.name == "b.jpg":
            info.pax_headers = {"mtime": "1.5"}

    data = tar_bytes([("a.jpg", b"a"), ("b.jpg", b"b"), ("c.jpg", b"c")], change=with_extension)
    at = members_of(data)[1].offset
    index = index_bytes(tmp_path, damaged(data, at + BLOCK, at + BLOCK + 8))
    assert index.faults == (f"damaged: the header extension at byte {at} cannot be read",)
    assert layout(index) == [("a", ["jpg"]), ("b", ["jpg"]), ("c", ["jpg"])]
    reasons = [sample.problem and sample.problem[0] for sample in index.samples]
    assert reasons == [None, Reason.TAR_DAMAGED, None]

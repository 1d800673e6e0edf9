import bz2
import gc
import gzip
import io
import logging
import lzma
import os
import random
import tarfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, Reason
from pipeline.inputs import storage
from pipeline.inputs.tar import BLOCK, ShardIndex, index_tar, split_name
from pipeline.inputs.tar_index import cached_index, load_index, save_index, saved_index

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_bytes(
    files: Iterable[tuple[str, bytes]],
    kind: int = tarfile.PAX_FORMAT,
    change: Callable[[tarfile.TarInfo], None] = lambda info: None,
) -> bytes:
    """A tar of ``(name, data)`` members; ``change`` may alter each header before it is written."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def members_of(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Key and members of every sample, as webdataset itself reads them."""
    with warnings.catch_warnings():
        # webdataset leaves the file for the garbage collector to close.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(wds.WebDataset(str(path), shardshuffle=False))
        gc.collect()
    return keys_and_members(samples)


def grouped_by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """The same by the two functions that do it within webdataset, which is faster."""
    with path.open("rb") as stream:
        files = wds.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        return keys_and_members(wds.tariterators.group_by_keys(files))


def keys_and_members(samples: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (sample["__key__"], {ext: data for ext, data in sample.items() if not ext.startswith("__")})
        for sample in samples
    ]


def layout(index: ShardIndex) -> list[tuple[str, list[str]]]:
    return [(sample.key, [member.ext for member in sample.members]) for sample in index.samples]


def index_bytes(folder: Path, data: bytes, name: str = "shard.tar") -> ShardIndex:
    (folder / name).write_bytes(data)
    return index_tar(str(folder / name))


def three(count: int = 4, size: int = 700) -> list[tuple[str, bytes]]:
    """Samples of three members of sizes around the block's, with bytes that tell them apart."""
    return [
        (f"{i:04d}.{ext}", bytes([i + 1]) * length)
        for i in range(count)
        for ext, length in (("jpg", size + i), ("seg.png", BLOCK), ("cls", 1))
    ]


def test_offsets_and_sizes_are_those_of_tarfile(tmp_path: Path) -> None:
    data = tar_bytes(three())
    index = index_bytes(tmp_path, data)
    found = [(m.offset, m.size) for sample in index.samples for m in sample.members]
    assert found == [(info.offset_data, info.size) for info in members_of(data)]
    assert layout(index) == [(f"{i:04d}", ["jpg", "seg.png", "cls"]) for i in range(4)]
    assert index.faults == ()
    assert index.size == len(data)
    assert all(sample.problem is None for sample in index.samples)


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS.keys())
def test_long_and_unicode_names_in_every_format(tmp_path: Path, kind: int) -> None:
    names = [
        "a/" * 60 + "b" * 30 + ".jpg",
        "häuser/straße 東京.JPG",
        "ü" * 45 + ".seg.png",
        "n" * 100 + "/k.a",
    ]
    if kind != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + ".jpg", "é" * 400 + "/y.b.c"]
    data = tar_bytes([(name, name.encode()) for name in names], kind)
    index = index_bytes(tmp_path, data)
    expected = by_webdataset(tmp_path / "shard.tar")
    assert layout(index) == [(key, list(members)) for key, members in expected]
    assert len(expected) == len(names)
    assert [s.members[0].offset for s in index.samples] == [info.offset_data for info in members_of(data)]


def test_sizes_beyond_eight_gibibytes(tmp_path: Path) -> None:
    size = (8 << 30) + 5
    info = tarfile.TarInfo("big.bin")
    info.size = size
    for name, head in (("gnu", info.tobuf(tarfile.GNU_FORMAT)), ("pax", info.tobuf(tarfile.PAX_FORMAT))):
        path = tmp_path / f"{name}.tar"
        with path.open("wb") as stream:
            stream.write(head)
            stream.seek(len(head) + (size + BLOCK - 1) // BLOCK * BLOCK)
            stream.write(tar_bytes([("after.jpg", b"x")]))
        index = index_tar(str(path))
        assert layout(index) == [("big", ["bin"]), ("after", ["jpg"])], name
        assert index.samples[0].members[0].size == size
        assert index.faults == ()
        path.unlink()


NAMES = st.one_of(
    st.text(st.sampled_from("ab.B/_é"), min_size=1, max_size=12),
    st.builds(
        lambda lead, folder, base, ext: f"{lead}{folder}{base}{ext}",
        st.sampled_from(["", "./", "/", "__meta__/", "../"]),
        st.sampled_from(["", "d/", "d.e/", "__m__/", ".git/", "ü/" * 60, "n" * 120 + "/", "a\nb/", "c.d\ne/"]),
        st.sampled_from(["a", "A", "b", "", ".hidden", "__x__", "__y", "x" * 130]),
        st.sampled_from(["", ".", ".jpg", ".JPG", ".seg.PNG", ".tar.gz", ".__z__", ".\n", ".Ü"]),
    ),
)
KINDS = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE])


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(st.tuples(NAMES, KINDS, st.integers(0, 3)), max_size=8),
    kind=st.sampled_from(list(FORMATS.values())),
)
@example([("d/.hidden.jpg", tarfile.REGTYPE, 1), ("d/.b.png", tarfile.REGTYPE, 1)], tarfile.PAX_FORMAT)
@example(
    [("a.jpg", tarfile.REGTYPE, 1), ("__x__", tarfile.REGTYPE, 1), ("a.png", tarfile.REGTYPE, 1)],
    tarfile.GNU_FORMAT,
)
@example([("a.jpg", tarfile.REGTYPE, 1), ("a.JPG", tarfile.REGTYPE, 1)], tarfile.USTAR_FORMAT)
def test_any_names_become_the_samples_of_webdataset(
    tmp_path: Path, entries: Sequence[tuple[str, bytes, int]], kind: int
) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for position, (name, kind_of_file, length) in enumerate(entries):
            info = tarfile.TarInfo(name)
            # The type of tars older than long names: tarfile takes one cut short behind a slash for a folder.
            old_and_long = kind_of_file == tarfile.AREGTYPE and len(name.encode()) > 90
            info.type = tarfile.REGTYPE if old_and_long else kind_of_file
            info.linkname = "a.jpg" if kind_of_file in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            # An old regular file whose name ends in a slash is a folder, and folders have no data.
            if info.isreg() and not name.endswith("/"):
                info.size = length
            try:
                tar.addfile(info, io.BytesIO(bytes([position + 1]) * info.size))
            except ValueError:
                assert kind == tarfile.USTAR_FORMAT, "only ustar cannot hold a name"
    path = tmp_path / "fuzzed.tar"
    path.write_bytes(stream.getvalue())
    index = index_tar(str(path))
    if any(first.key == second.key for first, second in pairwise(index.samples)):
        with pytest.raises(ValueError, match="duplicate file name"):
            grouped_by_webdataset(path)
        return
    data = path.read_bytes()
    assert [
        (s.key, {m.ext: data[m.offset : m.offset + m.size] for m in s.members if m.ext[:2] != "__"})
        for s in index.samples
    ] == grouped_by_webdataset(path)
    seen: set[str] = set()
    for sample in index.samples:
        assert (sample.problem is not None) == (sample.key in seen)
        seen.add(sample.key)


@settings(max_examples=500)
@given(st.one_of(NAMES, st.text(max_size=20)))
def test_split_name_agrees_with_webdataset_on_any_text(name: str) -> None:
    key, ext = wds.tariterators.base_plus_ext(name)
    found = split_name(name)
    assert found is None or found == (key, ext.lower())
    assert found is not None or key is None or name.startswith("__")


def test_a_name_that_is_no_utf8_can_be_stored(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    for kind in FORMATS.values():
        index = index_bytes(tmp_path, tar_bytes([(name, b"x")], kind))
        assert layout(index) == [("caf\\xe9", ["jpg"])]
        assert load_index(save_index(index)) == index


def test_global_pax_headers_and_extended_attributes(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by a test = 1"}
    ) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"SCHILY.xattr.user.x": "several\nlines = here", "mtime": "1.5"}
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
        tar.addfile(tarfile.TarInfo("ü.txt"))
    index = index_bytes(tmp_path, stream.getvalue())
    assert layout(index) == [("a", ["jpg"]), ("ü", ["txt"])]
    assert index.faults == ()


def extension(kind: bytes, body: bytes) -> bytes:
    """A header extension of the given type, as blocks."""
    info = tarfile.TarInfo("extension")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body.ljust((len(body) + BLOCK - 1) // BLOCK * BLOCK, b"\0")


def pax_record(keyword: str, value: str) -> bytes:
    length = len(keyword) + len(value) + 5
    assert 10 <= length < 100
    return b"%d %s=%s\n" % (length, keyword.encode(), value.encode())


@pytest.mark.parametrize(
    ("extensions", "key"),
    [
        ([(tarfile.GNUTYPE_LONGNAME, b"long.jpg\0"), (tarfile.XHDTYPE, pax_record("path", "pax.jpg"))], "long"),
        ([(tarfile.XHDTYPE, pax_record("path", "pax.jpg")), (tarfile.GNUTYPE_LONGNAME, b"long.jpg\0")], "pax"),
        ([(tarfile.XHDTYPE, pax_record("path", "one.jpg")), (tarfile.XHDTYPE, pax_record("path", "two.jpg"))], "one"),
        ([(tarfile.XHDTYPE, pax_record("path", "slash.jpg/"))], "slash"),
        ([(tarfile.XGLTYPE, pax_record("path", "all.jpg"))], "all"),
        ([(tarfile.XGLTYPE, pax_record("path", "all.jpg")), (tarfile.XHDTYPE, pax_record("path", "x.jpg"))], "x"),
        ([(tarfile.GNUTYPE_LONGLINK, b"link.jpg\0")], "plain"),
    ],
    ids=["L x", "x L", "x x", "x slash", "g", "g x", "K"],
)
def test_header_extensions_name_members_as_webdataset_takes_them(
    tmp_path: Path, extensions: list[tuple[bytes, bytes]], key: str
) -> None:
    data = b"".join(extension(*parts) for parts in extensions) + tar_bytes([("plain.jpg", b"x")])
    index = index_bytes(tmp_path, data)
    assert layout(index) == [(key, ["jpg"])]
    assert [name for name, _ in grouped_by_webdataset(tmp_path / "shard.tar")] == [key]
    assert index.faults == ()


def test_a_later_sample_of_the_same_key_is_a_problem(tmp_path: Path) -> None:
    names = ["a.jpg", "a.cls", "b.jpg", "a.jpg", "b.jpg", "b.jpg", "b.cls"]
    index = index_bytes(tmp_path, tar_bytes([(name, b"x") for name in names]))
    assert layout(index) == [
        ("a", ["jpg", "cls"]),
        ("b", ["jpg"]),
        ("a", ["jpg"]),
        ("b", ["jpg"]),
        ("b", ["jpg", "cls"]),
    ]
    assert [sample.problem and sample.problem[0] for sample in index.samples] == [
        None,
        None,
        *[Reason.REPEATED_KEY] * 3,
    ]
    assert [sample.problem[1] for sample in index.samples if sample.problem] == [
        "key a comes again; the first is sample 0 of the tar, and that one is used",
        "key b comes again; the first is sample 1 of the tar, and that one is used",
        "key b comes again; the first is sample 1 of the tar, and that one is used",
    ]


def test_sparse_members_are_listed_as_unsupported(tmp_path: Path) -> None:
    def sparse(info: tarfile.TarInfo) -> None:
        if info.name == "a.bin":
            info.type = tarfile.GNUTYPE_SPARSE
        if info.name == "b.bin":
            info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "c.bin"}

    files = [("a.bin", b"x" * 600), ("b.bin", b"y" * 600), ("d.bin", b"z")]
    index = index_bytes(tmp_path, tar_bytes(files, change=sparse))
    assert layout(index) == [("a", ["bin"]), ("c", ["bin"]), ("d", ["bin"])]
    assert [sample.problem and sample.problem[0] for sample in index.samples] == [
        Reason.UNSUPPORTED,
        Reason.UNSUPPORTED,
        None,
    ]


def test_extension_blocks_of_a_sparse_member_are_passed_over(tmp_path: Path) -> None:
    def sparse(info: tarfile.TarInfo) -> None:
        if info.name == "a.bin":
            info.type = tarfile.GNUTYPE_SPARSE

    data = bytearray(tar_bytes([("a.bin", b"x" * 600), ("b.bin", b"z")], tarfile.GNU_FORMAT, sparse))
    data[482] = 1
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    extension = bytearray(BLOCK)
    extension[504] = 1
    whole = bytes(data[:BLOCK]) + bytes(extension) + bytes(BLOCK) + bytes(data[BLOCK:])
    index = index_bytes(tmp_path, whole)
    assert layout(index) == [("a", ["bin"]), ("b", ["bin"])]
    assert index.faults == ()
    for cut in (BLOCK, 2 * BLOCK):
        index = index_bytes(tmp_path, whole[:cut])
        assert [s.problem and s.problem[0] for s in index.samples] == [Reason.TAR_TRUNCATED]
        assert index.faults[0].startswith("truncated: ")


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


def test_a_remote_tar_is_read_in_few_large_requests() -> None:
    url = "memory://test_tarindex/remote.tar"
    files = [(f"{i:04d}.jpg", bytes([i % 251]) * 100_000) for i in range(120)]
    data = tar_bytes(files)
    storage.write_atomic(url, data)
    requests: list[int] = []

    def read(name: str, start: int, stop: int) -> bytes:
        requests.append(stop - start)
        return storage.read_range(name, start, stop)

    index = index_tar(url, read=read)
    assert [s.members[0].offset for s in index.samples] == [info.offset_data for info in members_of(data)]
    assert len(requests) == 2
    assert index.faults == ()
    assert index.stamp


def test_a_local_tar_is_not_read_but_for_its_headers(tmp_path: Path) -> None:
    path = tmp_path / "local.tar"
    path.write_bytes(tar_bytes([(f"{i:04d}.jpg", bytes(100_000)) for i in range(100)]))
    read: list[int] = []

    def counting(name: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return storage.read_range(name, start, stop)

    index_tar(str(path), read=counting)
    assert sum(read) < path.stat().st_size / 20


def test_indexing_goes_on_after_errors_that_pass(tmp_path: Path) -> None:
    path = tmp_path / "flaky.tar"
    path.write_bytes(tar_bytes(three(30, 5000)))
    calls = 0

    def flaky(name: str, start: int, stop: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ConnectionResetError("connection reset by peer")
        return storage.read_range(name, start, stop)

    assert index_tar(str(path), read=flaky) == index_tar(str(path))
    assert calls > 3


def test_saving_and_loading_give_the_same_index(tmp_path: Path) -> None:
    data = tar_bytes([*three(), ("0001.jpg", b"again"), ("ü.東", b""), ("cut.jpg", bytes(9000))])
    for content in (data, data[:-12000], b"", tar_bytes([("none", b"")])):
        index = index_bytes(tmp_path, content)
        assert load_index(save_index(index)) == index
    missing = index_tar(str(tmp_path / "none.tar"))
    assert load_index(save_index(missing)) == missing


def test_loading_what_is_no_index_is_an_error() -> None:
    with pytest.raises(InputError, match=r"not an index that can be read.*it is made again"):
        load_index(b"garbage" * 10)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": ["a"]}), sink)
    with pytest.raises(InputError, match="format None"):
        load_index(bytes(sink.getvalue()))


def test_the_cache_holds_while_size_and_stamp_stand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, cache = tmp_path / "a.tar", tmp_path / "cache"
    path.write_bytes(tar_bytes(three(4)))
    requests = 0

    def counting(name: str, start: int, stop: int) -> bytes:
        nonlocal requests
        requests += 1
        return storage.read_range(name, start, stop)

    def again() -> tuple[ShardIndex, bool]:
        nonlocal requests
        requests = 0
        index = cached_index(str(path), str(cache), read=counting)
        return index, requests == 0

    first, from_cache = again()
    assert not from_cache
    assert again() == (first, True)
    os.utime(path, ns=(1, first_time := 1_700_000_000_000_000_000))
    assert not again()[1]
    path.write_bytes(tar_bytes(three(40)))
    os.utime(path, ns=(1, first_time))
    changed, from_cache = again()
    assert not from_cache
    assert len(changed.samples) == 40
    (saved,) = cache.iterdir()
    saved.write_bytes(saved.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        assert again() == (changed, False)
    assert "not an index that can be read" in caplog.text
    assert again() == (changed, True)
    path.unlink()
    assert again()[0].size == -1


def test_a_saved_index_is_read_without_its_tar(tmp_path: Path) -> None:
    url, cache = str(tmp_path / "a.tar"), str(tmp_path / "cache")
    with pytest.raises(InputError, match=r"no index of .*a\.tar in .*cache; run the job again"):
        saved_index(url, cache)
    (tmp_path / "a.tar").write_bytes(tar_bytes(three()))
    made = cached_index(url, cache)
    os.unlink(url)
    assert saved_index(url, cache) == made
    with pytest.raises(InputError, match=r"no index of .*b\.tar in .*cache"):
        saved_index(str(tmp_path / "b.tar"), cache)
    with pytest.raises(InputError, match=r"no index of .*a\.tar in .*elsewhere"):
        saved_index(url, str(tmp_path / "elsewhere"))


def test_a_saved_index_that_is_damaged_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, cache = str(tmp_path / "a.tar"), str(tmp_path / "cache")
    (tmp_path / "a.tar").write_bytes(tar_bytes(three()))
    cached_index(url, cache)
    (name,) = storage.list_files(cache)
    (tmp_path / "cache" / name).write_bytes(b"PAR1 and no more")
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match=r"no index of .*run the job again"):
        saved_index(url, cache)
    assert name in caplog.text, "the log says which file it was"


def test_real_shards(shared: Path) -> None:
    for path in [
        *sorted((shared / "data/camvid").glob("val-*.tar")),
        shared / "data/imagenet_sample/0000.tar",
    ]:
        index = index_tar(str(path))
        expected = by_webdataset(path)
        assert layout(index) == [(key, list(members)) for key, members in expected]
        assert index.faults == ()

import io
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import Reason
from pipeline.inputs.tar import BLOCK, index_tar, split_name
from pipeline.inputs.tar_index import load_index, save_index
from tests.pipeline.inputs.tars import (
    FORMATS,
    by_webdataset,
    grouped_by_webdataset,
    index_bytes,
    layout,
    members_of,
    tar_bytes,
    three,
)


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
KINDS = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.AREGTYPE, tarfile.DIRTYPE])


def is_ordinary(name: str) -> bool:
    """Whether a name is none that operating systems leave behind: of those webdataset makes samples."""
    return "._" not in name


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(st.tuples(NAMES.filter(is_ordinary), KINDS, st.integers(0, 3)), max_size=8),
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
    assert sum(len(sample.members) for sample in index.samples) + sum(dict(index.ignored).values()) == len(
        members_of(data)
    ), "every member is in a sample or counted as ignored"


@settings(max_examples=500)
@given(st.one_of(NAMES, st.text(max_size=20)))
def test_split_name_agrees_with_webdataset_on_any_text(name: str) -> None:
    key, ext = wds.tariterators.base_plus_ext(name)
    found = split_name(name)
    assert found is None or found == (key, ext.lower())
    assert found is not None or key is None or name.startswith("__") or "._" in name


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


def test_real_shards(shared: Path) -> None:
    for path in [
        *sorted((shared / "data/camvid").glob("val-*.tar")),
        shared / "data/imagenet_sample/0000.tar",
    ]:
        index = index_tar(str(path))
        expected = by_webdataset(path)
        assert layout(index) == [(key, list(members)) for key, members in expected]
        assert index.faults == ()

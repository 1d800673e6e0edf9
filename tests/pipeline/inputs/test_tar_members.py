import io
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import Reason
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import BLOCK, describe_ignored, describe_members, ignored_by, split_name
from pipeline.inputs.tar_index import load_index, save_index
from tests.pipeline.inputs.tars import (
    FORMATS,
    index_bytes,
    layout,
    tar_bytes,
)


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


Entry = tuple[str, bytes] | tuple[str, bytes, str]


def tar_of(*entries: Entry) -> bytes:
    """A tar of (name, data) files and (name, type, link target) others."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content, *target in entries:
            info = tarfile.TarInfo(name)
            if target:
                info.type, (info.linkname,) = content, target
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_every_member_is_in_a_sample_or_counted_as_ignored(tmp_path: Path) -> None:
    # Links, devices and directories were in neither, and nobody learned of them.
    data = tar_of(
        ("train", tarfile.DIRTYPE, ""),
        ("train/a.jpg", b"a"),
        ("train/a.seg.png", tarfile.SYMTYPE, "../masks/a.png"),
        ("train/b.jpg", tarfile.CHRTYPE, ""),
        ("train/c.jpg", tarfile.FIFOTYPE, ""),
        ("train/d.jpg", tarfile.LNKTYPE, "elsewhere/d.jpg"),
        ("train/README", b"text"),
        ("latest", tarfile.SYMTYPE, "train"),
        (".hidden", b"x"),
        ("__about__/x.json", b"{}"),
        ("train/e.jpg", b"e"),
    )
    index = index_bytes(tmp_path, data)
    assert layout(index) == [
        ("train/a", ["jpg", "seg.png"]),
        ("train/b", ["jpg"]),
        ("train/c", ["jpg"]),
        ("train/d", ["jpg"]),
        ("train/e", ["jpg"]),
    ]
    problems = [sample.problem for sample in index.samples]
    assert [problem and problem[0] for problem in problems] == [Reason.UNSUPPORTED] * 4 + [None]
    assert [problem[1] for problem in problems if problem] == [
        "train/a.seg.png is a symbolic link to ../masks/a.png; write the tar with --dereference, so that it holds the "
        "file",
        "train/b.jpg is a character device, not a file",
        "train/c.jpg is a FIFO, not a file",
        "train/d.jpg is a hard link to elsewhere/d.jpg, and no file of that name comes before it; add the file itself",
    ]
    assert dict(index.ignored) == {
        "directory": 1,
        "no extension": 2,
        "hidden or system file": 1,
        "meta (__name__)": 1,
    }
    assert describe_ignored(index.ignored) == (
        "1 directory, 2 no extension, 1 hidden or system file, 1 meta (__name__)"
    )
    assert load_index(save_index(index)) == index


def test_a_hard_link_has_the_data_of_the_earlier_file(tmp_path: Path) -> None:
    # tar writes a file that it met before, under another name, as a hard link.
    data = tar_of(
        ("a.jpg", b"image a"),
        ("a.seg.png", b"mask" * 300),
        ("b.jpg", b"image b"),
        ("b.seg.png", tarfile.LNKTYPE, "a.seg.png"),
        ("c.seg.png", tarfile.LNKTYPE, "a.seg.png"),
        ("c.jpg", b"image c"),
    )
    index = index_bytes(tmp_path, data)
    assert all(sample.problem is None for sample in index.samples)
    samples = read_samples(index, 0, 3)
    assert samples == [
        {"jpg": b"image a", "seg.png": b"mask" * 300},
        {"jpg": b"image b", "seg.png": b"mask" * 300},
        {"jpg": b"image c", "seg.png": b"mask" * 300},
    ]
    assert list(samples[2]) == ["seg.png", "jpg"], "the order of the tar"
    assert read_samples(index, 1, 2, lambda ext: ext == "seg.png") == [{"seg.png": b"mask" * 300}]


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS.keys())
def test_links_with_long_targets_name_them(tmp_path: Path, kind: int) -> None:
    target = "masks/" + "m" * (80 if kind == tarfile.USTAR_FORMAT else 300) + ".png"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        info = tarfile.TarInfo(target)
        tar.addfile(info)
        for name, kind_of_link in (("a.seg.png", tarfile.SYMTYPE), ("b.seg.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind_of_link, target
            tar.addfile(info)
    index = index_bytes(tmp_path, stream.getvalue())
    assert index.samples[1].problem is not None
    assert f"a.seg.png is a symbolic link to {target}; " in index.samples[1].problem[1]
    assert index.samples[2].problem is None


def test_what_a_mac_or_a_thumbnailer_leaves_disturbs_no_sample(tmp_path: Path) -> None:
    # Each ._ file became a sample of its own, and a repeated key of the one it lies beside.
    files: list[Entry] = [("photos/.DS_Store", b"x")]
    for key in ("0000", "0001", "0002"):
        for ext in ("jpg", "seg.png"):
            files += [(f"photos/._{key}.{ext}", b"attributes"), (f"photos/{key}.{ext}", b"data")]
    files += [
        ("__MACOSX/photos/._0000.jpg", b"x"),
        ("__MACOSX/photos/0000.jpg", b"x"),
        ("photos/Thumbs.db", b"x"),
        ("photos/desktop.ini", b"x"),
        ("photos/@eaDir/0000.jpg/SYNOPHOTO_THUMB_M.jpg", b"x"),
    ]
    index = index_bytes(tmp_path, tar_of(*files))
    assert layout(index) == [(f"photos/{key}", ["jpg", "seg.png"]) for key in ("0000", "0001", "0002")]
    assert all(sample.problem is None for sample in index.samples)
    assert index.ignored == (("hidden or system file", 12),)
    assert index.faults == ()


def test_a_tar_of_ignored_members_alone_says_which(tmp_path: Path) -> None:
    index = index_bytes(tmp_path, tar_of(("a", tarfile.DIRTYPE, ""), ("a/README", b"x"), ("a/._x.jpg", b"x")))
    assert index.faults == (
        "empty: the tar holds no file that is named as a member of a sample (key.extension); it holds 1 directory, "
        "1 no extension, 1 hidden or system file",
    )


def test_dots_in_base_names_are_explained(tmp_path: Path) -> None:
    index = index_bytes(tmp_path, tar_of(*((f"d/scene.2021.10.{n:02d}.jpg", b"x") for n in range(7))))
    (sample,) = index.samples
    assert describe_members(sample) == (
        ".2021.10.00.jpg, .2021.10.01.jpg, .2021.10.02.jpg, .2021.10.03.jpg, .2021.10.04.jpg and 2 more; the key of a "
        "sample ends at the first dot of the file name, so scene.2021.10.00.jpg is member .2021.10.00.jpg of d/scene: "
        "if these are several samples, write their names without dots"
    )
    (sample,) = index_bytes(tmp_path, tar_of(("a.jpg", b"x"), ("a.seg.png", b"x"))).samples
    assert describe_members(sample) == ".jpg, .seg.png"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("__meta__/a.jpg", "meta (__name__)"),
        ("a/.DS_Store", "hidden or system file"),
        (".hidden.jpg", "hidden or system file"),
        ("a/README", "no extension"),
        ("a/b.c/Makefile", "no extension"),
    ],
)
def test_the_rule_that_ignores_a_member_is_named(name: str, rule: str) -> None:
    assert split_name(name) is None
    assert ignored_by(name) == rule

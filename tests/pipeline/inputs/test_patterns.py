from pathlib import Path

import braceexpand
import pytest

from pipeline.errors import InputError
from pipeline.inputs import patterns, storage


def test_braces_expand_as_webdataset_writes_them() -> None:
    pattern = "s3://bucket/{train,val}-{000..012}.tar"
    assert patterns.expand([pattern]) == list(braceexpand.braceexpand(pattern))
    assert len(patterns.expand([pattern])) == 26


def test_globs_are_sorted_and_patterns_keep_their_order(root: str) -> None:
    for name in ("val-1.tar", "train-10.tar", "train-02.tar", "train-02.txt", "deep/er/x.tar"):
        storage.write_atomic(storage.join(root, name), b"x")

    def expand(*written: str) -> list[str]:
        names = patterns.expand([storage.join(root, pattern) for pattern in written])
        assert all(storage.exists(name) or "missing" in name for name in names)
        return [name.removeprefix(root + "/") for name in names]

    assert expand("val-?.tar", "missing.tar", "train-*.tar") == [
        "val-1.tar", "missing.tar", "train-02.tar", "train-10.tar",
    ]  # fmt: skip
    assert expand("{val,train}-*[0-9].tar") == ["val-1.tar", "train-02.tar", "train-10.tar"]
    assert expand("**/x.tar") == ["deep/er/x.tar"]


def test_a_plain_name_with_glob_signs_in_it_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "shard[1].tar"
    path.write_bytes(b"x")
    assert patterns.expand([str(path)]) == [str(path)]
    signed = "https://host/a.tar?X-Amz-Signature=a[b]"
    assert patterns.expand([signed]) == [signed]


def test_patterns_that_cannot_be_meant_are_errors(root: str, tmp_path: Path) -> None:
    storage.write_atomic(storage.join(root, "a-1.tar"), b"x")
    with pytest.raises(InputError, match="no input shards are named"):
        patterns.expand([])
    with pytest.raises(InputError, match=r"b-\*\.tar' matches no file; check the path"):
        patterns.expand([storage.join(root, "b-*.tar")])
    with pytest.raises(InputError, match=r"b-\*\.tar' \(part of .*\{a,b\}.* matches no file"):
        patterns.expand([storage.join(root, "{a,b}-*.tar")])
    with pytest.raises(InputError, match=r"1 of 2 input names come twice, first .*a-1\.tar; .*overlap"):
        patterns.expand([storage.join(root, "a-1.tar"), storage.join(root, "*.tar")])
    with pytest.raises(InputError, match=r"a\{1\.\.2' cannot be expanded: .*close every brace"):
        patterns.expand(["a{1..2"])
    with pytest.raises(InputError, match=r"is a folder, and a tar file is wanted; write .*/\*\.tar"):
        patterns.expand([str(tmp_path)])


def test_the_same_local_file_by_two_spellings_is_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="come twice"):
        patterns.expand([f"{tmp_path}/a.tar", f"file://{tmp_path}/./a.tar"])


def test_urls_that_differ_in_their_query_alone_are_refused() -> None:
    # What follows the question mark is stored nowhere, so the two would share an index.
    with pytest.raises(InputError, match="two of the inputs differ only in what follows the question mark of http"):
        patterns.expand(["https://host/download?id=1", "https://host/download?id=2"])

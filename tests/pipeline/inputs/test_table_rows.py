"""Groups of rows of parquet files: how often they are read, how much of them is held, and damage in them."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, Reason, SampleError
from pipeline.inputs.places import Place
from pipeline.inputs.read import read_samples
from pipeline.inputs.table_rows import large_groups
from pipeline.inputs.tar import ShardIndex
from tests.pipeline.inputs.tables import IMAGE, cells, keys, listed, read


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The groups of rows that are read, by whichever method."""
    found: list[Any] = []

    def counted(name: str) -> None:
        method = getattr(pq.ParquetFile, name)

        def read(self: pq.ParquetFile, *given: Any, **options: Any) -> Any:
            found.append(options.get("row_groups", given[:1]))
            return method(self, *given, **options)

        monkeypatch.setattr(pq.ParquetFile, name, read)

    counted("read_row_group")
    counted("iter_batches")
    return found


def test_each_group_is_read_once_for_all_columns(tmp_path: Path, reads: list[Any]) -> None:
    """Image, seg and depth pushed each other out of the cache: a group was read three times for each sample."""
    names = [str(number) for number in range(12)]
    columns = {name: pa.array(cells(*(name + one for one in names)), IMAGE) for name in ("image", "seg", "depth")}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=4)
    images = listed(tmp_path / "t.parquet")
    reads.clear()
    wanted = [
        {ext: f"{name}{one}".encode() for ext, name in (("jpg", "image"), ("seg.png", "seg"), ("depth.png", "depth"))}
        for one in names
    ]
    assert read(images) == wanted
    assert reads == [[0], [1], [2]]
    index = ShardIndex("", 0, "", tuple(images.samples), ())
    assert [read_samples(index, row, row + 1) for row in (9, 6, 8, 5)] == [[wanted[row]] for row in (9, 6, 8, 5)]
    assert reads == [[0], [1], [2]]


def damage(path: Path, group: int, column: str) -> None:
    """Overwrite the last bytes of what a column has in a group."""
    facts = pq.ParquetFile(path).metadata.row_group(group)
    (chunk,) = (one for n in range(facts.num_columns) if (one := facts.column(n)).path_in_schema == column)
    with path.open("r+b") as stream:
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        stream.seek(start + chunk.total_compressed_size - 60)
        stream.write(b"\xff" * 60)


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
@pytest.mark.parametrize("remote", [False, True])
def test_rows_of_a_damaged_group_fail_alone(
    tmp_path: Path, compression: str, remote: bool, reads: list[Any], s3: str
) -> None:
    """Damaged data came as OSError: tried five times, then the whole unit failed, in every run."""
    path = tmp_path / "t.parquet"
    images = [
        {"bytes": " ".join(map(str, range(number, 3000))).encode(), "path": f"{number}.jpg"} for number in range(6)
    ]
    table = pa.table({"image": pa.array(images, IMAGE), "seg": pa.array(cells(*"abcdef"), IMAGE)})
    pq.write_table(table, path, row_group_size=2, compression=compression, use_dictionary=False)
    whole = read(listed(path))
    damage(path, 1, "image.bytes")
    place = str(path)
    if remote:
        import s3fs

        place = f"{s3}/in/t.parquet"
        s3fs.S3FileSystem().pipe_file(place.removeprefix("s3://"), path.read_bytes())
    found = listed(place)
    reads.clear()
    good = read(found)
    assert reads == [[0], [1], [2]]
    assert [*good[:2], *good[4:]] == [*whole[:2], *whole[4:]]
    for row, error in enumerate(good[2:4], 2):
        assert isinstance(error, SampleError)
        assert error.reason is Reason.UNDECODABLE
        text = rf"row {row}: group 1 of {place} cannot be read from row 2 on \(.*(snappy|ZSTD).*\); copy it again"
        assert re.match(text, error.detail), error.detail


def test_damage_is_no_matter_of_listing_unless_keys_are_in_it(tmp_path: Path) -> None:
    """An image that is missing made the listing read the others, and their damage ended it by OSError."""
    path = tmp_path / "t.parquet"
    long = [" ".join(map(str, range(number, 3000))) for number in range(4)]
    images = [None if n == 1 else {"bytes": text.encode(), "path": f"{n}.jpg"} for n, text in enumerate(long)]
    table = pa.table({"image": pa.array(images, IMAGE), "key": [text[-9:] + str(n) for n, text in enumerate(long)]})
    pq.write_table(table, path, row_group_size=2, use_dictionary=False)
    wanted = keys(listed(path))
    damage(path, 0, "image.bytes")
    assert keys(listed(path)) == wanted
    assert [isinstance(one, SampleError) for one in read(listed(path))] == [True, True, False, False]
    pq.write_table(pa.table({"image": [b"a", b"b"], "key": long[:2]}), path, use_dictionary=False)
    damage(path, 0, "key")
    with pytest.raises(
        InputError, match=r"t\.parquet: key in group 0 of its rows cannot be read \(.+\); copy it again"
    ):
        listed(path)


def test_of_a_large_group_a_part_is_held(tmp_path: Path) -> None:
    """A group of 645 MB was read whole for one sample."""
    rows = [{"bytes": bytes([number]) * (1 << 20), "path": f"{number}.jpg"} for number in range(96)]
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE)}), tmp_path / "t.parquet", **options)
    index = ShardIndex("", 0, "", tuple(listed(tmp_path / "t.parquet").samples), ())
    before = pa.total_allocated_bytes()
    for row in (0, 95, 40, 41, 3):
        assert read_samples(index, row, row + 1) == [{"jpg": rows[row]["bytes"]}]
        assert pa.total_allocated_bytes() - before < 70 << 20


def test_a_list_is_refused_by_its_columns_alone(tmp_path: Path, reads: list[Any]) -> None:
    """A table of bytes was read whole, at four times its size, to say that it has no column of paths."""
    pq.write_table(pa.table({"jpg": [b"a"], "path": [b"b"], "cls": [1]}), tmp_path / "t.parquet")
    text = (
        r"columns \['jpg', 'path', 'cls'\]; .* give its name by --image-column; images themselves may be in jpg, path"
    )
    with pytest.raises(InputError, match=text):
        listed(tmp_path / "t.parquet")
    assert reads == []


def test_of_a_list_paths_and_labels_alone_are_read(tmp_path: Path, reads: list[Any]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "b.jpg").write_bytes(b"b")
    table = pa.table({"path": ["a.jpg", "b.jpg"], "cls": [3, 4], "thumbnail": [b"x" * 5000, b"y" * 5000]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1, use_dictionary=False)
    damage(tmp_path / "t.parquet", 1, "thumbnail")
    assert read(listed(tmp_path / "t.parquet")) == [{"jpg": b"a", "cls": b"3"}, {"jpg": b"b", "cls": b"4"}]
    assert reads == [[0], [1]]
    damage(tmp_path / "t.parquet", 1, "path")
    with pytest.raises(InputError, match=r"t\.parquet: group 1 of its rows cannot be read \(.+\); copy it again"):
        listed(tmp_path / "t.parquet")


def test_a_large_group_is_remarked_on_with_a_size_that_fits(tmp_path: Path) -> None:
    """By its footer, and by the columns that are read: nobody reads the sound."""
    rows = pa.table({"image": [bytes(1)] * 33, "sound": [bytes(9 << 20)] * 33, "take": ["a"] * 33})
    kinds = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(rows, tmp_path / "t.parquet", **kinds)
    assert large_groups([Place(str(tmp_path / "t.parquet"), "row", 0, column="image")]) == []
    (text,) = large_groups([Place(str(tmp_path / "t.parquet"), "row", 0, column="sound")])
    wanted = rf"groups of rows of up to 311\.\d MB \(33 rows, in {tmp_path}/t\.parquet\): .* row_group_size=3\)"
    assert re.fullmatch(wanted, text), text
    pq.write_table(rows, tmp_path / "u.parquet", row_group_size=3, **kinds)
    assert large_groups([Place(str(tmp_path / "u.parquet"), "row", 0, column="sound")]) == []

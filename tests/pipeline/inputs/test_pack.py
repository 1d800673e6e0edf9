"""Image files as WebDataset shards: what the library reads is what was packed."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.pack import main
from tests.pipeline.inputs.tars import grouped_by_webdataset
from tests.pipeline.inputs.test_images import write
from tests.pipeline.inputs.videos import write_video


def test_what_is_packed_is_what_webdataset_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    write(photos, "a/x.jpg", "a/v1.2.final.JPG", "a/v1_2_final.png", "IMG_1.jpg", "IMG_1.png", "notes.txt")
    write(tmp_path / "masks", "a/x.png")
    words = [str(photos), str(out / "p-%03d.tar"), "--label-dir", f"seg={tmp_path / 'masks'}"]
    assert main(words) == 0
    assert dict(grouped_by_webdataset(out / "p-000.tar")) == {
        "IMG_1": {"jpg": b"IMG_1.jpg"},
        "IMG_1_png": {"png": b"IMG_1.png"},
        "a/v1_2_final_": {"jpg": b"a/v1.2.final.JPG"},
        "a/v1_2_final": {"png": b"a/v1_2_final.png"},
        "a/x": {"jpg": b"a/x.jpg", "seg.png": b"a/x.png"},
    }
    text = capsys.readouterr().out
    assert "2 keys with dots are written without: IMG_1.png is IMG_1_png, a/v1.2.final is a/v1_2_final_" in text
    assert "5 samples in 1 shards; ignored: 1 no image (.txt)" in text
    assert main(words) == 1
    assert "p-000.tar is there already; give another name" in capsys.readouterr().err
    # The same images make the same bytes.
    assert main([str(photos), str(tmp_path / "again-%d.tar"), "--label-dir", f"seg={tmp_path / 'masks'}"]) == 0
    assert (tmp_path / "again-0.tar").read_bytes() == (out / "p-000.tar").read_bytes()


def test_what_cannot_be_read_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_video(tmp_path / "w.mp4", 20, noise=99, container_options={"movflags": "faststart"})
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert main([str(tmp_path / "cut.mp4"), str(tmp_path / "p-%d.tar"), "--every", "4"]) == 1
    packed = grouped_by_webdataset(tmp_path / "p-0.tar")
    assert [key for key, _ in packed] == ["cut/000000", "cut/000004"]
    assert {tuple(members) for _, members in packed} == {("ppm",)}
    printed = capsys.readouterr()
    assert "cut/000016 is left out: truncated: " in printed.out
    assert "2 samples in 1 shards\n" in printed.out
    assert "3 of 5 samples could not be read and are left out; the reasons stand above" in printed.err
    assert printed.err.count("\n") == 1


def test_where_nothing_can_be_read_no_shard_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tar without samples was written, and the exit status was 0."""
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert main([str(tmp_path / "a.mp4"), str(tmp_path / "out" / "p-%d.tar")]) == 1
    assert not list((tmp_path / "out").iterdir())
    printed = capsys.readouterr()
    assert "a is left out: undecodable: " in printed.out
    assert "0 samples in 0 shards" in printed.out
    assert "not one of 1 samples could be read, so no shard is written" in printed.err


def test_a_table_is_packed_by_the_column_that_is_chosen(tmp_path: Path) -> None:
    pq.write_table(pa.table({"photo": [b"a", b"b"], "id": [5, 6]}), tmp_path / "t.parquet")
    words = [str(tmp_path / "t.parquet"), str(tmp_path / "p-%d.tar"), "--image-column", "photo"]
    assert main(words) == 0
    assert dict(grouped_by_webdataset(tmp_path / "p-0.tar")) == {"5": {"jpg": b"a"}, "6": {"jpg": b"b"}}


def test_files_in_a_folder_may_be_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a relative path was put before it once more."""
    write(tmp_path, "in/a.jpg", "in/b.jpg")
    (tmp_path / "in" / "list.txt").write_text("b.jpg\n")
    write_video(tmp_path / "in" / "clip.mp4", 1)
    pq.write_table(pa.table({"image": [b"row"]}), tmp_path / "in" / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    places = ["in/a.jpg", "./in/list.txt", "in/clip.mp4", "file:in/rows.parquet"]
    assert main([*places, "out/p-%d.tar"]) == 0
    packed = dict(grouped_by_webdataset(tmp_path / "out" / "p-0.tar"))
    assert list(packed) == ["a", "b", "clip/000000", "rows/000000"]
    assert [packed[key]["jpg"] for key in ("a", "b", "rows/000000")] == [b"in/a.jpg", b"in/b.jpg", b"row"]


def test_shards_end_before_they_are_too_large(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(bytes(400 << 10))
    assert main([str(tmp_path / "photos"), str(tmp_path / "p-%d.tar"), "--shard-mb", "1"]) == 0
    tars = [grouped_by_webdataset(tmp_path / f"p-{number}.tar") for number in range(3)]
    assert [[key for key, _ in tar] for tar in tars] == [["0", "1"], ["2", "3"], ["4"]]
    assert not list(tmp_path.glob(".*"))


def test_of_a_video_the_bytes_of_its_frames_count(tmp_path: Path) -> None:
    """Of a video's few bytes one tar of many times the size was made."""
    video = write_video(tmp_path / "a.mp4", 5, size=(360, 480))
    assert video.stat().st_size < 100 << 10
    assert main([str(video), str(tmp_path / "p-%d.tar"), "--shard-mb", "1"]) == 0
    # Of 518,400 bytes each.
    tars = [grouped_by_webdataset(tmp_path / f"p-{number}.tar") for number in range(3)]
    assert [[key for key, _ in tar] for tar in tars] == [
        ["a/000000", "a/000001"], ["a/000002", "a/000003"], ["a/000004"]
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["out/p.tar", "out/%s.tar", "out/%d-%d.tar", "s3://bucket/%06d.tar"])
def test_names_without_a_number_are_refused(tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.jpg")
    assert main([str(tmp_path), pattern]) == 1
    assert "must be a local path with one number in it, such as out/train-%06d.tar" in capsys.readouterr().err


def test_a_kind_of_label_that_there_is_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.jpg")
    assert main([str(tmp_path), str(tmp_path / "%d.tar"), "--label-dir", "boxes=b"]) == 1
    assert "'boxes' must be KIND=FOLDER, with a KIND of seg, depth, cls" in capsys.readouterr().err

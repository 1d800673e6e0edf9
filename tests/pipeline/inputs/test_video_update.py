"""Stores of videos, and what becomes of them when the videos change."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputChangedError, Reason, SampleError
from pipeline.inputs.manifest import load_manifest
from pipeline.inputs.manifest_update import update_manifests
from pipeline.inputs.plan import Plan
from pipeline.inputs.plan_update import update_plan
from pipeline.inputs.read import read_samples
from tests.pipeline.inputs.videos import listed, number_of, pixels, write_video

KEPT = ["000000.images.parquet"]


def test_a_new_video_is_appended_and_one_that_changed_is_refused(tmp_path: Path) -> None:
    folder, plan_dir, cache = tmp_path / "in", str(tmp_path / "plan"), str(tmp_path / "index")
    write_video(folder / "b.mp4", 4)
    urls = update_manifests(plan_dir, listed(folder))
    plan = Plan(update_plan(None, urls, cache).shards, 2, cache)
    assert plan.samples == 4
    # Touched: the same digest, and the bytes of what is finished are to be compared.
    os.utime(folder / "b.mp4", (0, 0))
    with pytest.raises(InputChangedError, match=r"b\.mp4 changed since it was listed"):
        read_samples(plan.index(0), 0, 1)
    write_video(folder / "a.mp4", 3)
    update = update_plan(plan, update_manifests(plan_dir, listed(folder), KEPT), cache)
    assert (update.to_recheck, update.appended) == ((0,), 1)
    keys = [[sample.key for sample in load_manifest(shard.url).samples] for shard in update.shards]
    assert keys == [[f"b/{n:06d}" for n in range(4)], [f"a/{n:06d}" for n in range(3)]]
    kept = [*KEPT, "000001.images.parquet"]
    with pytest.raises(InputChangedError, match=r"b\.mp4#frame=1&pts=\d+ is in the store and not among what is chosen"):
        update_manifests(plan_dir, listed(folder, every=2), kept)
    write_video(folder / "b.mp4", 4, noise=100)
    with pytest.raises(InputChangedError, match=r"b\.mp4 is not what the store was made from: .* another size then"):
        update_manifests(plan_dir, listed(folder), kept)
    write_video(folder / "b.mp4", 3)
    with pytest.raises(InputChangedError, match=r"b\.mp4 is not what the store was made from: its size is another"):
        update_manifests(plan_dir, listed(folder), kept)


def test_fewer_frames_are_skipped_later_and_the_others_appended(tmp_path: Path) -> None:
    plan_dir = str(tmp_path / "plan")
    path = write_video(tmp_path / "a.mp4", 6)
    update_manifests(plan_dir, listed(path, every=3))
    urls = update_manifests(plan_dir, listed(path), KEPT)
    keys = [[int(sample.key.removeprefix("a/")) for sample in load_manifest(url).samples] for url in urls]
    assert keys == [[0, 3], [1, 2, 4, 5]]


def test_a_manifest_keeps_marks_and_problems(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "w.mp4", 20, noise=99, container_options={"movflags": "faststart"})
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    images = listed(tmp_path / "cut.mp4")
    (url,) = update_manifests(str(tmp_path / "plan"), images)
    assert load_manifest(url).samples == tuple(images.samples)
    assert images.samples[-1].problem is not None


def test_a_moved_video_is_known_by_its_keys(tmp_path: Path) -> None:
    folder, plan_dir, cache = tmp_path / "in", str(tmp_path / "plan"), str(tmp_path / "index")
    write_video(folder / "a.mp4", 3)
    plan = Plan(update_plan(None, update_manifests(plan_dir, listed(folder)), cache).shards, 2, cache)
    shutil.move(folder, tmp_path / "moved")
    update = update_plan(plan, update_manifests(plan_dir, listed(tmp_path / "moved"), KEPT), cache)
    assert (update.to_recheck, update.appended) == ((0,), 0)
    (one,) = read_samples(Plan(update.shards, 2, cache).index(0), 2, 3)
    assert number_of(pixels(one["ppm"])) == 2  # type: ignore[index]


def test_a_video_that_can_be_read_again_is_appended_to_its_store(tmp_path: Path) -> None:
    folder, plan_dir, cache = tmp_path / "in", str(tmp_path / "plan"), str(tmp_path / "index")
    path = write_video(folder / "a.mp4", 3)
    whole = path.read_bytes()
    write_video(folder / "b.mp4", 1)
    path.write_bytes(bytes(len(whole)))
    plan = Plan(update_plan(None, update_manifests(plan_dir, listed(folder)), cache).shards, 2, cache)
    path.write_bytes(whole)
    urls = update_manifests(plan_dir, listed(folder), KEPT)
    update = update_plan(plan, urls, cache)
    assert (update.to_recheck, update.appended) == ((), 1)
    keys = [[sample.key for sample in load_manifest(url).samples] for url in urls]
    assert keys == [["a", "b/000000"], ["a/000000", "a/000001", "a/000002"]]
    found = [one for url in urls for one in read_samples(load_manifest(url), 0, len(load_manifest(url).samples))]
    assert [one.reason if isinstance(one, SampleError) else "" for one in found] == [Reason.UNDECODABLE, "", "", "", ""]
    assert update_manifests(plan_dir, listed(folder), [*KEPT, "000001.images.parquet"]) == urls
    path.unlink()
    with pytest.raises(InputChangedError, match=r"1 images that the store was made from are gone, first .*a\.mp4;"):
        update_manifests(plan_dir, listed(folder), KEPT)


def test_a_file_that_is_called_like_a_part_is_a_file(tmp_path: Path) -> None:
    """It was looked for in a table of the name's first half."""
    folder, plan_dir = tmp_path / "in", str(tmp_path / "plan")
    write_video(folder / "clip.mp4", 2)
    pq.write_table(pa.table({"image": [b"row 0", b"row 1"]}), folder / "rows.parquet")
    names = ["left#row=1&column=a.jpg", "rows.parquet#row=1&column=image.jpg", "clip.mp4#frame=1"]
    for name in names:
        (folder / name).write_bytes(name.encode())
    images = listed(folder, folder / names[2])
    (url,) = update_manifests(plan_dir, images)
    assert update_manifests(plan_dir, images, KEPT) == [url]
    index = load_manifest(url)
    found = dict(zip([sample.key for sample in index.samples], read_samples(index, 0, 7), strict=True))
    contents = {key: list(one.values()) for key, one in found.items() if isinstance(one, dict)}
    assert contents.keys() == found.keys()
    frames = [contents.pop(f"clip/00000{number}") for number in range(2)]
    assert [number_of(pixels(data)) for (data,) in frames] == [0, 1]
    assert contents == {
        "left#row=1&column=a": [names[0].encode()],
        "rows.parquet#row=1&column=image": [names[1].encode()],
        "rows/000000": [b"row 0"],
        "rows/000001": [b"row 1"],
        "clip": [names[2].encode()],
    }
    (folder / names[0]).write_bytes(b"changed")
    with pytest.raises(InputChangedError, match=r"left#row=1&column=a\.jpg is not what the store .*: 7 bytes now, 23"):
        update_manifests(plan_dir, listed(folder, folder / names[2]), KEPT)
    (folder / names[0]).unlink()
    with pytest.raises(InputChangedError, match=r"are gone, first .*left#row=1&column=a\.jpg; put them back"):
        update_manifests(plan_dir, listed(folder, folder / names[2]), KEPT)

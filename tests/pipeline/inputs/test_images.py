"""Image files as input: which become samples, with which keys and labels, and what happens when the folder changes."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputChangedError, InputError
from pipeline.inputs.images import ImageList, list_images, update_manifests
from pipeline.inputs.manifest import load_manifest
from pipeline.inputs.plan import Plan
from pipeline.inputs.plan_update import update_plan
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import ShardIndex

EXTS = ("jpg", "jpeg", "png")
LABELS = {"seg": ("seg.png",), "depth": ("depth.png", "depth.npy"), "cls": ("cls", "cls.txt")}


def write(folder: Path, *names: str) -> None:
    """Files whose bytes are their names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def listed(*places: object, label_dirs: dict[str, str] | None = None) -> ImageList:
    return list_images([str(place) for place in places], EXTS, LABELS, label_dirs or {})


def keys(images: ImageList) -> list[str]:
    return [sample.key for sample in images.samples]


def indices(urls: Sequence[str]) -> list[ShardIndex]:
    return [load_manifest(url) for url in urls]


def test_a_folder_gives_its_images_and_counts_the_rest(tmp_path: Path) -> None:
    write(
        tmp_path, "b.JPG", "a photo.jpeg", "ä/ünï.png", "ä/v1.2.final.jpg", "notes.txt", "README", ".hidden.jpg",
        ".git/x.jpg", "._b.JPG", "Thumbs.db", "@eaDir/b.jpg", "__MACOSX/b.jpg",
    )  # fmt: skip
    images = listed(tmp_path)
    assert keys(images) == ["a photo", "b", "ä/v1.2.final", "ä/ünï"]
    assert images.ignored == {"no image (.txt)": 1, "no image (no extension)": 1}


def test_places_that_overlap_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a/x.jpg", "y.jpg")
    with pytest.raises(InputError, match=r"x\.jpg comes twice; .* two of the places overlap"):
        listed(tmp_path, tmp_path / "a")
    assert keys(listed(tmp_path / "a", tmp_path / "y.jpg")) == ["x", "y"]


def test_images_of_one_stem_are_two_samples(tmp_path: Path) -> None:
    """IMG_1.png beside IMG_1.jpeg was dropped without a word."""
    write(tmp_path, "IMG_1.jpeg", "IMG_1.png", "IMG_2.png")
    assert keys(listed(tmp_path)) == ["IMG_1", "IMG_1.png", "IMG_2"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "data", "x.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "in" / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    assert keys(listed(tmp_path / "in")) == ["linked/x"]


def test_labels_come_from_parallel_folders(tmp_path: Path) -> None:
    write(tmp_path / "photos", "a/x.jpg", "a/x.png", "y.jpg")
    write(tmp_path / "masks", "a/x.png", "y.PNG", "z.png", "notes.txt")
    write(tmp_path / "depth", "a/x.npy")
    images = listed(tmp_path / "photos", label_dirs={"seg": str(tmp_path / "masks"), "depth": str(tmp_path / "depth")})
    members = {sample.key: [member.ext for member in sample.members] for sample in images.samples}
    assert members == {
        "a/x": ["jpg", "seg.png", "depth.npy"],
        "a/x.png": ["png", "seg.png", "depth.npy"],
        "y": ["jpg", "seg.png"],
    }
    assert images.ignored == {"label without an image": 1}


def test_a_list_names_images_and_labels(tmp_path: Path) -> None:
    write(tmp_path, "in/b.jpg", "in/a.jpg", "far/c.png", "m/a.png")
    text = tmp_path / "in" / "list.txt"
    text.write_text(f"b.jpg\n\na.jpg\n{tmp_path}/far/c.png\n")
    images = listed(text)
    assert keys(images)[:2] == ["b", "a"]
    assert keys(images)[2].endswith("far/c")
    table = tmp_path / "list.csv"
    table.write_text("image,cls,seg\nin/a.jpg,17,m/a.png\nin/b.jpg,,\n")
    update = update_manifests(str(tmp_path / "out"), listed(table), keep=False)
    (index,) = indices(update)
    assert read_samples(index, 0, 2) == [
        {"jpg": b"in/a.jpg", "cls": b"17", "seg.png": b"m/a.png"},
        {"jpg": b"in/b.jpg"},
    ]
    pq.write_table(pa.table({"path": ["in/a.jpg"], "cls": [3]}), tmp_path / "list.parquet")
    (index,) = indices(update_manifests(str(tmp_path / "out"), listed(tmp_path / "list.parquet"), keep=False))
    assert read_samples(index, 0, 1) == [{"jpg": b"in/a.jpg", "cls": b"3"}]


def test_a_file_that_is_named_is_an_image_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path, "download", "x.bin", "y.jpg")
    images = listed(tmp_path / "download", tmp_path / "x.bin", tmp_path / "y.jpg")
    assert [(sample.key, sample.members[0].ext) for sample in images.samples] == [
        ("download", "jpg"), ("x", "jpg"), ("y", "jpg")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("l.txt", "gone.jpg", "there is no file .*gone.jpg, which is named as an image"),
        ("l.txt", "a.jpg\na.jpg", "a.jpg comes twice; every image may be read once"),
        ("l.csv", "file,cls\na.jpg,1", r"has columns \['file', 'cls'\]; name that of the paths image or path"),
        ("l.csv", "image,seg\na.jpg,a.jpg", r"named as a label of kind seg, which ends in \.png"),
        ("l.txt", "https://host/a.jpg?X-Amz-Signature=abc", "https://host/a.jpg: a URL with a query may be signed"),
        ("l.parquet", "no parquet", "is no parquet file that can be read"),
    ],
)
def test_lists_that_cannot_be_used_say_why(tmp_path: Path, name: str, content: str, text: str) -> None:
    write(tmp_path, "a.jpg")
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=text):
        listed(tmp_path / name)


def test_no_image_at_all_says_what_there_is(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.txt")
    with pytest.raises(InputError, match=r"not one image in .* \(2 no image \(\.txt\)\); images end in jpg, jpeg, png"):
        listed(tmp_path)
    with pytest.raises(InputError, match=r"there is no folder of images at .*none"):
        listed(tmp_path / "none")


def test_new_images_come_behind_those_of_a_store_and_keys_stay(tmp_path: Path) -> None:
    photos, folder = tmp_path / "photos", str(tmp_path / "plan")
    write(photos, "b.png", "c.jpg")
    first = update_manifests(folder, listed(photos), keep=False)
    assert update_manifests(folder, listed(photos), keep=True) == first
    write(photos, "a.jpg", "b.jpg", "x.txt")
    urls = update_manifests(folder, listed(photos), keep=True)
    assert [[sample.key for sample in index.samples] for index in indices(urls)] == [["b", "c"], ["a", "b.jpg"]]
    assert [dict(index.ignored) for index in indices(urls)] == [{}, {"no image (.txt)": 1}]
    assert urls[0] == first[0]
    os.remove(photos / "b.png")
    with pytest.raises(InputChangedError, match=r"1 images that the store was made from are gone, first .*b\.png"):
        update_manifests(folder, listed(photos), keep=True)
    assert [len(index.samples) for index in indices(update_manifests(folder, listed(photos), keep=False))] == [3]


def test_an_image_that_changes_is_told_before_it_is_mixed_in(tmp_path: Path) -> None:
    photos, folder, cache = tmp_path / "photos", str(tmp_path / "plan"), str(tmp_path / "index")
    write(photos, "a.jpg", "b.jpg")
    urls = update_manifests(folder, listed(photos), keep=False)
    plan = Plan(update_plan(None, urls, cache).shards, 2, cache)
    assert read_samples(plan.index(0), 0, 1) == [{"jpg": b"a.jpg"}]
    # Of the same size, while a job runs.
    (photos / "b.jpg").write_bytes(b"B.jpg")
    with pytest.raises(InputChangedError, match=r"b\.jpg changed since it was listed"):
        read_samples(plan.index(0), 1, 2)
    # In the next run the digest, of names and sizes, is the same: bytes of finished samples are to be compared.
    update = update_plan(plan, update_manifests(folder, listed(photos), keep=True), cache)
    assert update.to_recheck == (0,)
    (photos / "b.jpg").write_bytes(b"another size")
    with pytest.raises(
        InputChangedError, match=r"b\.jpg is not what the store was made from: 12 bytes now, 5 bytes th"
    ):
        update_manifests(folder, listed(photos), keep=True)
    os.remove(photos / "a.jpg")
    with pytest.raises(InputChangedError, match=r"a\.jpg is gone"):
        read_samples(plan.index(0), 0, 1)

"""Image files as input: which become samples, with which keys and labels, and what happens when the folder changes."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputChangedError, InputError
from pipeline.inputs.images import ImageList, list_images
from pipeline.inputs.manifest import load_manifest
from pipeline.inputs.manifest_update import update_manifests
from pipeline.inputs.plan import Plan
from pipeline.inputs.plan_update import update_plan
from pipeline.inputs.read import read_samples
from pipeline.inputs.tar import ShardIndex

EXTS = ("jpg", "jpeg", "png")
KEPT = ["000000.images.parquet"]
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
    write(tmp_path / "photos", "a/x.jpg", "y.jpg")
    write(tmp_path / "masks", "a/x.png", "y.PNG", "z.png", "notes.txt")
    write(tmp_path / "depth", "a/x.npy")
    images = listed(tmp_path / "photos", label_dirs={"seg": str(tmp_path / "masks"), "depth": str(tmp_path / "depth")})
    members = {sample.key: [member.ext for member in sample.members] for sample in images.samples}
    assert members == {
        "a/x": ["jpg", "seg.png", "depth.npy"],
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
    update = update_manifests(str(tmp_path / "out"), listed(table))
    (index,) = indices(update)
    assert read_samples(index, 0, 2) == [
        {"jpg": b"in/a.jpg", "cls": b"17", "seg.png": b"m/a.png"},
        {"jpg": b"in/b.jpg"},
    ]
    pq.write_table(pa.table({"path": ["in/a.jpg"], "cls": [3]}), tmp_path / "list.parquet")
    (index,) = indices(update_manifests(str(tmp_path / "out"), listed(tmp_path / "list.parquet")))
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
        (
            "l.txt",
            "https://host/a.jpg?X-Amz-Signature=abc",
            "https://host/a.jpg: a URL with a user or a query may",
        ),
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
    first = update_manifests(folder, listed(photos))
    assert update_manifests(folder, listed(photos), KEPT) == first
    write(photos, "a.jpg", "b.jpg", "x.txt")
    urls = update_manifests(folder, listed(photos), KEPT)
    assert [[sample.key for sample in index.samples] for index in indices(urls)] == [["b", "c"], ["a", "b.jpg"]]
    assert [dict(index.ignored) for index in indices(urls)] == [{}, {"no image (.txt)": 1}]
    assert urls[0] == first[0]
    os.remove(photos / "b.png")
    with pytest.raises(InputChangedError, match=r"1 images that the store was made from are gone, first .*b\.png"):
        update_manifests(folder, listed(photos), KEPT)
    assert [len(index.samples) for index in indices(update_manifests(folder, listed(photos)))] == [3]


def test_an_image_that_changes_is_told_before_it_is_mixed_in(tmp_path: Path) -> None:
    photos, folder, cache = tmp_path / "photos", str(tmp_path / "plan"), str(tmp_path / "index")
    write(photos, "a.jpg", "b.jpg")
    urls = update_manifests(folder, listed(photos))
    plan = Plan(update_plan(None, urls, cache).shards, 2, cache)
    assert read_samples(plan.index(0), 0, 1) == [{"jpg": b"a.jpg"}]
    # Of the same size, while a job runs.
    (photos / "b.jpg").write_bytes(b"B.jpg")
    with pytest.raises(InputChangedError, match=r"b\.jpg changed since it was listed"):
        read_samples(plan.index(0), 1, 2)
    # In the next run the digest, of names and sizes, is the same: bytes of finished samples are to be compared.
    update = update_plan(plan, update_manifests(folder, listed(photos), KEPT), cache)
    assert update.to_recheck == (0,)
    (photos / "b.jpg").write_bytes(b"another size")
    with pytest.raises(
        InputChangedError, match=r"b\.jpg is not what the store was made from: 12 bytes now, 5 bytes th"
    ):
        update_manifests(folder, listed(photos), KEPT)
    os.remove(photos / "a.jpg")
    with pytest.raises(InputChangedError, match=r"a\.jpg is gone"):
        read_samples(plan.index(0), 0, 1)


def test_one_label_is_not_that_of_two_images(tmp_path: Path) -> None:
    """Two cameras' frames of one name got the first camera's labels."""
    write(tmp_path, "cam0/1.jpg", "cam1/1.jpg", "masks/1.png")
    with pytest.raises(InputError, match=r"masks/1\.png would be the label of two images, .*cam0/1\.jpg and .*cam1/1"):
        listed(tmp_path / "cam0", tmp_path / "cam1", label_dirs={"seg": str(tmp_path / "masks")})


def test_labels_among_the_images_are_no_images(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "a.seg.png", "a.depth.npy", "masks/a.png")
    images = listed(tmp_path, label_dirs={"seg": str(tmp_path / "masks")})
    assert keys(images) == ["a"]
    assert images.ignored["label beside its image (.seg.png)"] == 1


@pytest.mark.parametrize("place", ["https://user:secret@host/photos", "sftp://user:secret@host/photos/a.jpg"])
def test_places_with_a_password_are_refused_and_do_not_show_it(place: str) -> None:
    with pytest.raises(InputError, match="may hold a password or a signature") as caught:
        listed(place)
    assert "secret" not in str(caught.value)


def test_tables_as_other_programs_write_them(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "excel.csv").write_bytes("image,cls\na.jpg,3\n".encode("utf-8-sig"))
    (index,) = indices(update_manifests(str(tmp_path / "out"), listed(tmp_path / "excel.csv")))
    assert read_samples(index, 0, 1) == [{"jpg": b"a.jpg", "cls": b"3"}]
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"], "cls": [5.0, float("nan")]}), tmp_path / "pandas.parquet")
    (index,) = indices(update_manifests(str(tmp_path / "out"), listed(tmp_path / "pandas.parquet")))
    assert read_samples(index, 0, 2) == [{"jpg": b"a.jpg", "cls": b"5"}, {"jpg": b"b.jpg"}]
    (tmp_path / "latin.csv").write_bytes("image\nfrühling.jpg\n".encode("latin-1"))
    with pytest.raises(InputError, match="is no UTF-8 text"):
        listed(tmp_path / "latin.csv")
    (tmp_path / "gap.csv").write_text("image,cls\na.jpg,1\n,2\n")
    with pytest.raises(InputError, match=r"gap\.csv: row 1 names no image"):
        listed(tmp_path / "gap.csv")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "list.txt").write_text("folder.jpg\n")
    with pytest.raises(InputError, match=r"folder\.jpg is named as an image or label, and is no file"):
        listed(tmp_path / "list.txt")


def test_images_that_moved_are_known_by_their_keys(tmp_path: Path) -> None:
    photos, folder, cache = tmp_path / "photos", str(tmp_path / "plan"), str(tmp_path / "index")
    write(photos, "a.jpg", "b.jpg")
    urls = update_manifests(folder, listed(photos))
    plan = Plan(update_plan(None, urls, cache).shards, 2, cache)
    photos.rename(tmp_path / "moved")
    update = update_plan(plan, update_manifests(folder, listed(tmp_path / "moved"), KEPT), cache)
    assert update.to_recheck == (0,), "the bytes of what is finished are to be compared"
    assert read_samples(Plan(update.shards, 2, cache).index(0), 0, 1) == [{"jpg": b"a.jpg"}]


def test_images_that_moved_after_a_store_has_grown_stay_in_their_manifests(tmp_path: Path) -> None:
    photos, folder = tmp_path / "photos", str(tmp_path / "plan")
    write(photos, "b.jpg", "d.jpg")
    update_manifests(folder, listed(photos))
    write(photos, "a.jpg", "c.jpg")
    update_manifests(folder, listed(photos), KEPT)
    photos.rename(tmp_path / "moved")
    write(tmp_path / "moved", "e.jpg")
    urls = update_manifests(folder, listed(tmp_path / "moved"), [*KEPT, "000001.images.parquet"])
    assert [[sample.key for sample in index.samples] for index in indices(urls)] == [["b", "d"], ["a", "c"], ["e"]]
    places = [sample.members[0].url for index in indices(urls) for sample in index.samples]
    assert places == [str(tmp_path / "moved" / f"{key}.jpg") for key in "bdace"]


def test_an_image_of_the_store_is_not_where_another_moved_to(tmp_path: Path) -> None:
    """Of the key, extension and size of the one that is gone."""
    write(tmp_path, "cam0/1.jpg", "cam1/1.jpg")
    places = [tmp_path / "cam0", tmp_path / "cam1"]
    folder = str(tmp_path / "plan")
    assert keys(listed(*places)) == ["1", "1.jpg"]
    update_manifests(folder, listed(*places))
    (tmp_path / "cam0" / "1.jpg").rename(tmp_path / "cam0" / "2.jpg")
    with pytest.raises(InputChangedError, match=r"1 images that the store was made from are gone, first .*cam0/1\.jpg"):
        update_manifests(folder, listed(*places), KEPT)


def test_nothing_is_written_where_an_image_is_refused(tmp_path: Path) -> None:
    photos, folder = tmp_path / "photos", str(tmp_path / "plan")
    write(photos, "a.jpg", "b.jpg")
    (manifest,) = update_manifests(folder, listed(photos))
    before = Path(manifest).read_bytes()
    os.utime(photos / "a.jpg", (0, 0))
    (photos / "b.jpg").write_bytes(b"another size")
    write(photos, "c.jpg")
    with pytest.raises(InputChangedError):
        update_manifests(folder, listed(photos), KEPT)
    assert Path(manifest).read_bytes() == before
    assert os.listdir(folder) == KEPT
    os.remove(manifest)
    with pytest.raises(InputError, match="is gone, which lists images that the store was made from"):
        update_manifests(folder, listed(photos), KEPT)


def test_manifests_of_a_run_that_made_no_store_bind_nobody(tmp_path: Path) -> None:
    photos, folder = tmp_path / "photos", str(tmp_path / "plan")
    write(photos, "a.jpg")
    update_manifests(folder, listed(photos))
    write(photos, "b.jpg")
    update_manifests(folder, listed(photos), KEPT)
    # The run ended before its store had grown, and the new image is gone again.
    os.remove(photos / "b.jpg")
    assert [len(index.samples) for index in indices(update_manifests(folder, listed(photos), KEPT))] == [1]
    assert os.listdir(folder) == KEPT


def test_manifests_of_before_videos_and_tables_are_read(tmp_path: Path) -> None:
    write(tmp_path / "photos", "a.jpg", "b.jpg")
    images = listed(tmp_path / "photos")
    (url,) = update_manifests(str(tmp_path / "plan"), images)
    digest = load_manifest(url).digest
    table = pq.read_table(url)
    old = table.drop_columns(["mark", "reason", "detail"]).replace_schema_metadata(
        {**table.schema.metadata, b"images": b"1"}
    )
    pq.write_table(old, url)
    assert load_manifest(url).samples == tuple(images.samples)
    assert load_manifest(url).digest == digest
    before = Path(url).read_bytes()
    assert update_manifests(str(tmp_path / "plan"), images, KEPT) == [url]
    assert Path(url).read_bytes() == before, "nothing changed: it stays as it is"

"""Tables of images: saved Hugging Face data sets and parquet files, by their columns, keys, gaps and changes."""

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import EnvironmentFault, InputChangedError, InputError, Reason, SampleError
from pipeline.inputs.images import ImageList
from pipeline.inputs.manifest import load_manifest
from pipeline.inputs.manifest_update import update_manifests
from pipeline.inputs.plan import Plan
from pipeline.inputs.plan_update import update_plan
from pipeline.inputs.read import read_samples
from pipeline.inputs.tables import choose_columns
from pipeline.inputs.tar import ShardIndex
from tests.pipeline.inputs.tables import IMAGE, cells, keys, listed, read

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets

KEPT = ["000000.images.parquet"]
KINDS = ("seg", "depth", "cls")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def data_set(columns: dict[str, list[Any]], **features: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_a_saved_data_set_gives_its_rows_with_their_labels(tmp_path: Path) -> None:
    whole = data_set(
        {
            "label": [2, 0, -1, None, 1],
            "image": cells("a.png", "b.jpg", "c", "d.jpeg", "e.webp"),
            "annotation": [*cells("ma", "mb"), None, *cells("md", "me")],
        },
        label=datasets.ClassLabel(names=["x", "y", "z"]),
        image=datasets.Image(),
        annotation=datasets.Image(),
    )
    whole.save_to_disk(tmp_path / "saved", num_shards=2)
    images = listed(tmp_path / "saved")
    assert keys(images) == [f"{number:06d}" for number in range(5)]
    assert read(images) == [
        {"png": b"a.png", "seg.png": b"ma", "cls": b"2"},
        {"jpg": b"b.jpg", "seg.png": b"mb", "cls": b"0"},
        {"jpg": b"c"},
        {"jpeg": b"d.jpeg", "seg.png": b"md"},
        {"jpg": b"e.webp", "seg.png": b"me", "cls": b"1"},
    ]
    # Kinds that nobody asks for are not looked at.
    assert read(listed(tmp_path / "saved", label_columns=()))[0] == {"png": b"a.png"}
    assert not (tmp_path / "saved" / "cache").exists()
    # Rows of a shuffled one are in its own order.
    whole.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    order = datasets.load_from_disk(tmp_path / "shuffled").cast_column("image", datasets.Image(decode=False))["image"]
    assert [next(iter(one.values())) for one in read(listed(tmp_path / "shuffled"))] == [one["bytes"] for one in order]


def test_rows_are_called_by_their_key_or_id(tmp_path: Path) -> None:
    features = {"image": datasets.Image(), "id": datasets.Value("int64"), "key": datasets.Value("string")}
    columns = {"image": cells("a", "b", "c", "d"), "id": [7, 8, 9, 9], "key": ["x/1.5", "y", None, "y"]}
    data_set(columns, **features).save_to_disk(tmp_path / "one")
    assert keys(listed(tmp_path / "one")) == ["x/1.5", "y", "000002", "000003"]
    data_set({"image": columns["image"], "id": columns["id"]}, image=features["image"], id=features["id"]).save_to_disk(
        tmp_path / "two"
    )
    assert keys(listed(tmp_path / "two")) == ["7", "8", "9", "000003"]
    assert keys(listed(tmp_path / "one", tmp_path / "two"))[4:] == ["7", "8", "9", "two/000003"]


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize("data", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["bytes", "struct"])
def test_each_of_arrows_types_of_text_and_bytes_is_taken(
    tmp_path: Path, text: pa.DataType, data: pa.DataType, nested: bool
) -> None:
    """A key of large_string, as polars and pandas 3 write it, was left out in silence: rows had their numbers."""
    kind = pa.struct([("bytes", data), ("path", text)]) if nested else data
    images = cells("a", "b", "c") if nested else [b"a", b"b", b"c"]
    table = pa.table({"image": pa.array(images, kind), "key": pa.array(["x", "y", None], text)})
    pq.write_table(table, tmp_path / "t.parquet")
    found = listed(tmp_path / "t.parquet")
    assert (keys(found), read(found)) == (["x", "y", "t/000002"], [{"jpg": b"a"}, {"jpg": b"b"}, {"jpg": b"c"}])


@pytest.mark.parametrize("value", [pa.string(), pa.large_string(), pa.int64(), pa.uint8()], ids=str)
def test_keys_and_classes_may_be_categories(tmp_path: Path, value: pa.DataType) -> None:
    """Dictionaries: what pandas calls a category."""
    whole = pa.types.is_integer(value)
    names = pa.array([7, 5, 7, None] if whole else ["u", "v", "u", None], value).dictionary_encode()
    classes = pa.array([1, 0, 1, None], pa.int16()).dictionary_encode()
    pq.write_table(pa.table({"image": [b"a", b"b", b"c", b"d"], "id": names, "cls": classes}), tmp_path / "t.parquet")
    found = listed(tmp_path / "t.parquet")
    assert keys(found) == [*(["7", "5"] if whole else ["u", "v"]), "t/000002", "t/000003"]
    wanted = [{"jpg": b"a", "cls": b"1"}, {"jpg": b"b", "cls": b"0"}, {"jpg": b"c", "cls": b"1"}, {"jpg": b"d"}]
    assert read(found) == wanted


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "category"], ids=str)
def test_a_column_of_paths_is_one_in_each_type_of_text(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    column = pa.array(["a.jpg"]).dictionary_encode() if kind == "category" else pa.array(["a.jpg"], kind)
    pq.write_table(pa.table({"photo": column}), tmp_path / "list.parquet")
    assert read(listed(tmp_path / "list.parquet", image_column="photo")) == [{"jpg": b"a"}]


def test_images_that_are_files_and_images_that_are_not_there(tmp_path: Path) -> None:
    """What is no image is a sample that fails, so that the account is that of the data set."""
    rows = [*cells("a.jpg"), {"bytes": None, "path": "far/b.png"}, None, {"bytes": None, "path": None}]
    masks = [None, {"bytes": None, "path": "far/m.png"}, None, None]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE), "mask": pa.array(masks, IMAGE)}), tmp_path / "t.parquet")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.png").write_bytes(b"file")
    (tmp_path / "far" / "m.png").write_bytes(b"mask")
    images = listed(tmp_path / "t.parquet")
    assert keys(images) == [f"t/{number:06d}" for number in range(4)]
    first, second, *missing = read(images)
    assert (first, second) == ({"jpg": b"a.jpg"}, {"png": b"file", "seg.png": b"mask"})
    assert images.samples[1].members[0].url == str(tmp_path / "far" / "b.png")
    for number, one in enumerate(missing, 2):
        assert isinstance(one, SampleError)
        assert one.reason is Reason.IMAGE_MISSING
        assert one.detail == f"row {number} of {tmp_path}/t.parquet has no image"
    os.remove(tmp_path / "far" / "b.png")
    with pytest.raises(InputError, match=r"there is no file .*b\.png"):
        listed(tmp_path / "t.parquet")
    data_set({"image": [*cells("a.jpg"), None]}, image=datasets.Image()).save_to_disk(tmp_path / "saved")
    assert "row 1 of" in str(read(listed(tmp_path / "saved"))[1])


def test_parquet_files_as_the_hub_has_them(tmp_path: Path) -> None:
    """Several groups of rows; of a folder all files with images, beside images that are files."""
    data = tmp_path / "data"
    data.mkdir()
    names = [f"{number}.png" for number in range(10)]
    table = data_set(
        {"image": cells(*names), "label": list(range(10))}, image=datasets.Image(), label=datasets.Value("int64")
    )
    table.to_parquet(data / "train-00000-of-00002.parquet", batch_size=4)
    assert pq.ParquetFile(data / "train-00000-of-00002.parquet").metadata.num_row_groups == 3
    pq.write_table(pa.table({"image": pa.array(cells("x.jpg"), IMAGE)}), data / "train-00001-of-00002.parquet")
    pq.write_table(pa.table({"caption": ["no image"]}), data / "captions.parquet")
    (data / "photo.jpg").write_bytes(b"photo")
    images = listed(tmp_path)
    assert keys(images) == [
        "data/photo",
        *(f"data/train-00000-of-00002/{number:06d}" for number in range(10)),
        "data/train-00001-of-00002/000000",
    ]
    wanted = [{"png": f"{number}.png".encode(), "cls": str(number).encode()} for number in range(10)]
    assert read(images) == [{"jpg": b"photo"}, *wanted, {"jpg": b"x.jpg"}]
    assert images.ignored == {"no image (.parquet)": 1}
    index = ShardIndex("", 0, "", tuple(images.samples), ())
    assert read_samples(index, 9, 10) == [wanted[8]]
    assert keys(listed(data / "train-00001-of-00002.parquet")) == ["train-00001-of-00002/000000"]


def test_bytes_alone_are_images_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"a", None], "jpg": [b"x", b"y"]}), tmp_path / "t.parquet")
    assert read(listed(tmp_path / "t.parquet"))[0] == {"jpg": b"a"}
    assert isinstance(read(listed(tmp_path / "t.parquet"))[1], SampleError)
    assert read(listed(tmp_path / "t.parquet", image_column="jpg")) == [{"jpg": b"x"}, {"jpg": b"y"}]


def test_a_parquet_file_in_a_bucket_is_read_there(s3: str) -> None:
    import s3fs

    table = pa.table({"image": pa.array(cells("a.png", "b.png", "c.png"), IMAGE)})
    with s3fs.S3FileSystem().open(f"{s3}/in/t.parquet", "wb") as stream:
        pq.write_table(table, stream, row_group_size=2)
    images = listed(f"{s3}/in")
    assert keys(images) == [f"t/{number:06d}" for number in range(3)]
    assert read(images) == [{"png": b"a.png"}, {"png": b"b.png"}, {"png": b"c.png"}]


def schema(**columns: str) -> pa.Schema:
    """Columns by their kinds: image, text, number."""
    kinds = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "text": pa.string(),
        "number": pa.int64(),
    }
    return pa.schema([(name, kinds[kind]) for name, kind in columns.items()])


@pytest.mark.parametrize(
    ("columns", "image", "labels", "key"),
    [
        ({"picture": "image"}, "picture", {}, None),
        ({"image": "image", "other": "image"}, "image", {}, None),
        ({"photo": "image", "mask": "image", "id": "number"}, "photo", {"seg": "mask"}, "id"),
        ({"image": "image", "label": "image"}, "image", {"seg": "label"}, None),
        ({"image": "image", "label": "number"}, "image", {"cls": "label"}, None),
        ({"image": "image", "label": "text"}, "image", {}, None),
        ({"image": "image", "cls": "number", "label": "number"}, "image", {"cls": "cls"}, None),
        ({"image": "image", "seg": "image", "mask": "image"}, "image", {"seg": "seg"}, None),
        ({"image": "image", "depth": "image", "key": "text", "id": "text"}, "image", {"depth": "depth"}, "key"),
    ],
)
def test_columns_are_known_by_name_and_type(
    columns: dict[str, str], image: str, labels: dict[str, str], key: str | None
) -> None:
    found = choose_columns(schema(**columns), "t", None, KINDS)
    assert found is not None
    assert (found.image, found.labels, found.key) == (image, labels, key)


def test_columns_that_may_be_meant_are_named_and_one_can_be_chosen() -> None:
    two = schema(left="image", right="image", mask="image", annotation="image")
    with pytest.raises(InputError, match=r"several columns of images, left, right; name the one .* by --image-column"):
        choose_columns(two, "t", None, KINDS)
    with pytest.raises(InputError, match="may have seg labels in annotation, mask; call the column that is meant"):
        choose_columns(two, "t", "left", KINDS)
    found = choose_columns(two, "t", "left", ["cls"])
    assert found is not None
    assert found.image == "left"
    with pytest.raises(InputError, match=r"no images in a column 'up' \(--image-column\); its columns are \['left'"):
        choose_columns(two, "t", "up", KINDS)
    # Sound has the same type as images; a data set says what it is.
    features = datasets.Features({"image": datasets.Image(), "sound": datasets.Value("string")})
    about = features.arrow_schema.metadata[b"huggingface"].replace(b'"sound"', b'"clip"')
    sound = schema(image="image", sound="image").with_metadata({"huggingface": about})
    assert choose_columns(sound, "t", None, KINDS) == choose_columns(schema(image="image"), "t", None, KINDS)
    assert choose_columns(schema(text="text"), "t", None, KINDS) is None


def test_a_data_set_of_splits_names_them(tmp_path: Path) -> None:
    split = data_set({"image": cells("a")}, image=datasets.Image())
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match=r"data set of 2 splits, train, validation; .* --images .*both/train, or"):
        listed(tmp_path / "both")
    assert keys(listed(tmp_path / "both" / "train", tmp_path / "both" / "validation")) == [
        "000000",
        "validation/000000",
    ]


def test_data_sets_that_cannot_be_used_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_set({"text": ["a"]}, text=datasets.Value("string")).save_to_disk(tmp_path / "text")
    with pytest.raises(InputError, match=r"has columns \['text'\] and none of images; give it one by dataset\.cast"):
        listed(tmp_path / "text")
    saved = tmp_path / "saved"
    data_set({"image": cells("a")}, image=datasets.Image()).save_to_disk(saved)
    (arrow,) = saved.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(InputError, match="saved is a data set that cannot be read"):
        listed(saved)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"which the package 'datasets' reads; pip install .*\[hf\]"):
        listed(saved)


def test_an_image_column_without_a_table_is_refused_and_lists_have_one_too(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    with pytest.raises(InputError, match=r"image_column='photo' is a column of a table, and there is none in"):
        listed(tmp_path / "a.jpg", image_column="photo")
    (tmp_path / "list.csv").write_text("photo,cls\na.jpg,3\n")
    assert read(listed(tmp_path / "list.csv", image_column="photo")) == [{"jpg": b"a", "cls": b"3"}]
    pq.write_table(pa.table({"photo": ["a.jpg"]}), tmp_path / "list.parquet")
    assert read(listed(tmp_path / "list.parquet", image_column="photo")) == [{"jpg": b"a"}]


def test_sizes_are_estimates_of_the_images_alone(tmp_path: Path) -> None:
    """A heavy other column counted; a store that was made so takes its table for unchanged."""
    table = pa.table({"image": [b"a" * 100, b"b" * 300], "sound": [bytes(50_000)] * 2})
    pq.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    images = listed(tmp_path / "t.parquet")
    assert all(200 <= member.size < 500 for sample in images.samples for member in sample.members)
    old = [replace(one, members=tuple(replace(m, size=50_000) for m in one.members)) for one in images.samples]
    plan_dir = str(tmp_path / "plan")
    (place,) = update_manifests(plan_dir, ImageList(old))
    assert update_manifests(plan_dir, images, KEPT) == [place]
    assert load_manifest(place).samples == tuple(old)
    # A file that moved is known again as well.
    os.rename(tmp_path / "t.parquet", tmp_path / "u.parquet")
    moved = listed(tmp_path / "u.parquet")
    moved.samples = [replace(one, key=f"t/{n:06d}") for n, one in enumerate(moved.samples)]
    update_manifests(plan_dir, moved, KEPT)
    assert [one.members[0].size for one in load_manifest(place).samples] == [50_000, 50_000]


def test_new_files_are_appended_and_changed_ones_refused(tmp_path: Path) -> None:
    folder, plan_dir, cache = tmp_path / "in", str(tmp_path / "plan"), str(tmp_path / "index")
    folder.mkdir()

    def write(name: str, *images: str) -> None:
        data_set({"image": cells(*images)}, image=datasets.Image()).to_parquet(folder / name)

    write("b.parquet", "1", "2")
    plan = Plan(update_plan(None, update_manifests(plan_dir, listed(folder)), cache).shards, 2, cache)
    os.utime(folder / "b.parquet", (0, 0))
    with pytest.raises(InputChangedError, match=r"b\.parquet changed since it was listed"):
        read_samples(plan.index(0), 0, 1)
    write("a.parquet", "3")
    update = update_plan(plan, update_manifests(plan_dir, listed(folder), KEPT), cache)
    assert (update.to_recheck, update.appended) == ((0,), 1)
    found = [[sample.key for sample in load_manifest(shard.url).samples] for shard in update.shards]
    assert found == [["b/000000", "b/000001"], ["a/000000"]]
    write("b.parquet", "1", "another")
    with pytest.raises(InputChangedError, match=r"b\.parquet is not what the store was made from"):
        update_manifests(plan_dir, listed(folder), [*KEPT, "000001.images.parquet"])

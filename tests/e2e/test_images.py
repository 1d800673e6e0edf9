"""A folder of photographs as people have it, in one command: every file in its documented place."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.decode.kinds import IMAGE_EXTS
from pipeline.inputs.images import list_images
from pipeline.loader.dataset import FeatureDataset
from tests.e2e import support
from tests.e2e.in_process import run
from tests.e2e.support import encode, photograph

OPTIONS = (*support.TINY, "--stride", 16, "--upsampler", "bilinear")


def _picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (60, 80)) -> Image.Image:
    return Image.fromarray(photograph(seed, size)).convert(mode)


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _bytes(_picture(5), "JPEG", exif=exif)


def _files() -> dict[str, bytes]:
    alpha = _picture(7)
    alpha.putalpha(Image.fromarray(photograph(8)[..., 0]))
    whole = encode(photograph(9))
    return {
        "holiday 2024/beach photo.jpg": encode(photograph(0)),
        "holiday 2024/Zürich/日本.png": encode(photograph(1), "PNG"),
        "UPPER.JPG": encode(photograph(2)),
        "Mixed.JpEg": encode(photograph(3)),
        "portrait.jpg": encode(photograph(4, (90, 50))),
        "turned.jpg": _turned(),
        "grey.png": _bytes(_picture(6, "L"), "PNG"),
        "alpha.png": _bytes(alpha, "PNG"),
        "v1.2.final.jpg": encode(photograph(10)),
        "IMG_1.jpeg": encode(photograph(11)),
        "IMG_1.png": encode(photograph(12), "PNG"),
        "picture.webp": _bytes(_picture(13), "WEBP"),
        "scan.tif": _bytes(_picture(14), "TIFF"),
        "wrong_name.png": encode(photograph(15)),
        "corrupt.jpg": b"\xff\xd8 this is no photograph",
        "truncated.jpg": whole[: len(whole) // 2],
        "notes.txt": b"where these were taken",
        "list.xlsx": b"a table",
        ".thumbnails/beach photo.jpg": encode(photograph(16)),
        "._beach photo.jpg": b"Mac OS X",
        "Thumbs.db": b"thumbnails",
        ".DS_Store": b"finder",
    }


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name, data in _files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def store(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "photographs"
    text = run("precompute", "--images", photographs, "--out", out, *OPTIONS, "--max-failed-fraction", 0.2)
    assert "input 16 = ok 14 + failed 2" in text
    return out


def _features(store: Path) -> dict[str, np.ndarray]:
    index = [row for row in pq.read_table(store / "index").to_pylist() if row["status"] == "ok"]
    dataset = FeatureDataset(str(store), ["features"])
    by_row = {int(sample["row"]): sample["features"].numpy() for sample in dataset}
    return {row["key"]: by_row[row["row"]] for row in index}


def test_every_file_of_a_folder_is_in_its_documented_place(store: Path) -> None:
    rows = {row["key"]: row for row in pq.read_table(store / "index").to_pylist()}
    names = {name: name.rpartition(".")[0] for name in _files() if not name.startswith((".", "Thumbs"))}
    for name in ("notes.txt", "list.xlsx"):
        assert names.pop(name) not in rows
    names["IMG_1.png"] = "IMG_1.png"
    assert rows.keys() == set(names.values())
    reasons = {key: row["reason"] for key, row in rows.items() if row["status"] != "ok"}
    assert reasons == {"corrupt": "undecodable", "truncated": "truncated"}
    flags = {key: row["flags"].split() for key, row in rows.items()}
    for key, flag in (("turned", "exif_rotated"), ("alpha", "alpha"), ("grey", "grey")):
        assert flag in flags[key], (key, flags[key])
    assert (rows["portrait"]["height"], rows["portrait"]["width"]) == (90, 50)
    assert "clean: " in run("verify", store)


def test_the_same_command_finds_nothing_to_do_and_new_photographs_are_appended(
    photographs: Path, store: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "photographs", tmp_path / "out"
    shutil.copytree(photographs, folder)
    # Copied elsewhere: other paths and time stamps, the same bytes.
    command = ("--images", folder, "--out", out, *OPTIONS, "--max-failed-fraction", 0.2)
    run("precompute", *command)
    assert " 0 to do" in run("precompute", *command)
    (folder / "a new one.jpg").write_bytes(encode(photograph(30)))
    text = run("precompute", *command)
    assert "1 to do with 1 samples" in text
    assert "input 17 = ok 15 + failed 2" in text
    before, after = _features(store), _features(out)
    assert after.keys() - before.keys() == {"a new one"}
    assert all(np.array_equal(after[key], features) for key, features in before.items())
    # A dry run leaves a store's lists of images alone, and a store that was moved takes them along.
    assert "17 samples" in run("precompute", *command, "--dry-run")
    assert " 0 to do" in run("precompute", *command)
    out = out.rename(tmp_path / "moved")
    assert "clean: " in run("verify", out)
    command = ("--images", folder, "--out", out, *OPTIONS, "--max-failed-fraction", 0.2)
    assert " 0 to do" in run("precompute", *command)
    (folder / "UPPER.JPG").write_bytes(encode(photograph(31)))
    text = run("precompute", *command, status=1)
    assert "UPPER.JPG is not what the store was made from" in text


def test_a_list_with_labels_and_a_folder_with_label_folders_give_one_store(tmp_path: Path) -> None:
    for number in range(3):
        pixels = photograph(number)
        for place, data in (
            (f"photos/{number}.jpg", encode(pixels)),
            (f"masks/{number}.png", encode((pixels[..., 0] // 32).astype(np.uint8), "PNG")),
            (f"classes/{number}.txt", str(number).encode()),
        ):
            (tmp_path / place).parent.mkdir(exist_ok=True)
            (tmp_path / place).write_bytes(data)
    lines = [f"photos/{number}.jpg,masks/{number}.png,{number}\n" for number in range(3)]
    (tmp_path / "list.csv").write_text("image,seg,cls\n" + "".join(lines))
    labels = ("--labels", "seg", "cls", *OPTIONS)
    folders = ("--label-dir", f"seg={tmp_path / 'masks'}", f"cls={tmp_path / 'classes'}")
    run("precompute", "--images", tmp_path / "photos", *folders, *labels, "--out", tmp_path / "a")
    run("precompute", "--images", tmp_path / "list.csv", *labels, "--out", tmp_path / "b")
    assert support.array_files(tmp_path / "a") == support.array_files(tmp_path / "b")
    dataset = FeatureDataset(str(tmp_path / "a"), ["features", "seg", "cls"])
    assert [int(sample["cls"]) for sample in dataset] == [0, 1, 2]
    assert "labels of 1 units compared" in run("verify", tmp_path / "a")


def test_packed_as_shards_the_same_photographs_have_the_same_features(
    photographs: Path, store: Path, tmp_path: Path
) -> None:
    assert "16 samples in 1 shards" in run("pack", photographs, tmp_path / "p-%06d.tar")
    command = ("--shards", tmp_path / "p-000000.tar", "--out", tmp_path / "out", *OPTIONS)
    run("precompute", *command, "--max-failed-fraction", 0.2)
    assert support.array_files(tmp_path / "out") == support.array_files(store)


def test_by_list_table_and_data_set_the_same_photographs_have_the_same_features(
    photographs: Path, store: Path, tmp_path: Path
) -> None:
    import datasets

    datasets.disable_progress_bars()
    samples = list_images([str(photographs)], IMAGE_EXTS, {}, {}).samples
    places = [sample.members[0].url for sample in samples]
    (tmp_path / "list.txt").write_text("\n".join(places))
    columns = {
        "image": [{"bytes": Path(place).read_bytes(), "path": Path(place).name} for place in places],
        "key": [sample.key for sample in samples],
    }
    features = datasets.Features({"image": datasets.Image(), "key": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, features=features)
    table.save_to_disk(tmp_path / "saved", num_shards=3)
    table.to_parquet(tmp_path / "table.parquet", batch_size=5)
    for name in ("list.txt", "saved", "table.parquet"):
        out = tmp_path / f"out-{name}"
        command = ("--images", tmp_path / name, "--out", out, *OPTIONS, "--max-failed-fraction", 0.2)
        assert "input 16 = ok 14 + failed 2" in run("precompute", *command), name
        assert support.array_files(out) == support.array_files(store), name
        assert " 0 to do" in run("precompute", *command), name
        assert "clean: " in run("verify", out)
        if name != "list.txt":
            assert _features(out).keys() == _features(store).keys()
    # Packed from there they are the same tar.
    for name, place in (("a", photographs), ("b", tmp_path / "saved")):
        assert "16 samples in 1 shards" in run("pack", place, tmp_path / f"{name}-%d.tar")
    names = [support.tar_files(tmp_path / f"{name}-0.tar") for name in "ab"]
    assert names[0] == names[1]


def test_labels_that_no_image_has_are_refused_before_anything_is_computed(photographs: Path, tmp_path: Path) -> None:
    command = ("--images", photographs, "--out", tmp_path / "out", *OPTIONS, "--labels", "seg")
    for more in ((), ("--dry-run",)):
        text = run("precompute", *command, *more, status=1)
        assert "not one of the 16 samples of" in text
        assert "has a seg label (seg.png); they have 7 .jpg" in text
        assert "with --images give --label-dir" in text
    assert not (tmp_path / "out" / "features.zarr").exists()

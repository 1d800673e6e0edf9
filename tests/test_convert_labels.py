"""The recipes of docs/datasets.md on small folders with the names and ids of the originals."""

import importlib.util
import io
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from jobs import pack

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_labels", ROOT / "docs" / "convert_labels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def packed(tar: Path, ending: str) -> dict[str, np.ndarray]:
    """The labels of a shard, by the keys of their samples, which all have an image."""
    with tarfile.open(tar) as file:
        names = [name for name in file.getnames() if name.endswith(ending)]
        labels = {}
        for name in names:
            member = file.extractfile(name)
            assert member is not None
            labels[name.removesuffix(ending)] = np.asarray(Image.open(io.BytesIO(member.read())))
        assert len(file.getnames()) == 2 * len(names)
    return labels


PHOTO = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("recipe", "label", "image", "ids", "expected"),
    [
        ("ade150", "training/ADE_train_1.png", "training/ADE_train_1.jpg", [0, 1, 150, 151], [255, 0, 149, 255]),
        (
            "cityscapes19", "ulm/ulm_000000_000019_gtFine_labelIds.png", "ulm/ulm_000000_000019_leftImg8bit.png",
            [0, 7, 33, 9], [255, 0, 18, 255],
        ),
        (
            "cityscapes27", "ulm/ulm_000000_000019_gtFine_labelIds.png", "ulm/ulm_000000_000019_leftImg8bit.png",
            [6, 7, 33, 255], [255, 0, 26, 255],
        ),
        ("cocostuff27", "000000000009.png", "000000000009.jpg", [0, 90, 91, 255], [9, 4, 17, 255]),
    ],
    ids=["ade150", "cityscapes19", "cityscapes27", "cocostuff27"],
)  # fmt: skip
def test_converted_labels_find_their_images(
    recipes: ModuleType, tmp_path: Path, recipe: str, label: str, image: str, ids: list[int], expected: list[int]
) -> None:
    write(tmp_path / "labels" / label, np.array([ids], np.uint8))
    write(tmp_path / "images" / image, PHOTO)
    assert recipes.main([recipe, str(tmp_path / "labels"), str(tmp_path / "masks")]) == 0
    shards, masks = str(tmp_path / "out-%02d.tar"), f"seg={tmp_path / 'masks'}"
    assert pack.main([str(tmp_path / "images"), shards, "--label-dir", masks]) == 0
    (found,) = packed(tmp_path / "out-00.tar", ".seg.png").values()
    assert found.tolist() == [expected]


def test_every_recipe_uses_each_of_its_classes(recipes: ModuleType) -> None:
    for name, recipe in recipes.RECIPES.items():
        assert set(recipe.table.tolist()) == {*range(recipe.classes), 255}, name
    coco = recipes.RECIPES["cocostuff27"].table
    # COCO's ids from 0: person, bicycle, dog, chair, book; grass, sea, sky, wall of brick, wood.
    assert [coco[original] for original in (0, 1, 17, 61, 83, 123, 154, 156, 170, 181)] == [
        9, 11, 7, 3, 4, 22, 26, 23, 18, 24
    ]  # fmt: skip
    assert (coco[182:] == 255).all()


def test_voc_needs_a_list_and_no_conversion(tmp_path: Path) -> None:
    """As the recipe's sed writes it, with labels in a palette."""
    write(tmp_path / "JPEGImages/2007_000032.jpg", PHOTO)
    write(tmp_path / "SegmentationClass/2007_000032.png", np.array([[0, 20, 255]], np.uint8), palette=True)
    (tmp_path / "train.csv").write_text("image,seg\nJPEGImages/2007_000032.jpg,SegmentationClass/2007_000032.png\n")
    assert pack.main([str(tmp_path / "train.csv"), str(tmp_path / "out-%02d.tar")]) == 0
    (found,) = packed(tmp_path / "out-00.tar", ".seg.png").values()
    assert found.tolist() == [[0, 20, 255]]


def test_nyuv2_frames_are_upright_and_in_millimetres(recipes: ModuleType, tmp_path: Path) -> None:
    images = np.zeros((2, 3, 6, 4), np.uint8)
    images[1, 0, 5, 0] = 200
    depths = np.full((2, 6, 4), 1.2344, np.float32)
    recipes.write_depth_frames(images, depths, np.array([2]), tmp_path)
    photo, depth = (np.asarray(Image.open(tmp_path / name / "0002.png")) for name in ("images", "depth"))
    assert photo.shape == (4, 6, 3)
    assert photo[0, 5].tolist() == [200, 0, 0], "the rightmost pixel of the first row"
    assert depth.shape == (4, 6)
    assert depth.dtype == np.uint16
    assert set(depth.flat) == {1234}


def test_arguments_and_labels_that_cannot_be(recipes: ModuleType, tmp_path: Path) -> None:
    assert recipes.main([]) == recipes.main(["voc", "a", "b"]) == 2
    with pytest.raises(ValueError, match=r"no file \*\.png below"):
        recipes.main(["ade150", str(tmp_path), str(tmp_path / "out")])
    write(tmp_path / "colours.png", PHOTO)
    with pytest.raises(ValueError, match="class ids are 8-bit grey or palette"):
        recipes.main(["ade150", str(tmp_path), str(tmp_path / "out")])

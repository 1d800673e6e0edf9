"""Looking at stores: what is said, and what the pictures show."""

import contextlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs.show import main
from pipeline.errors import ConfigError, StoreError
from pipeline.loader import FeatureDataset
from pipeline.options import Size
from pipeline.viewing import contact_sheet, describe_store, picture_place, sample_picture, similarity_picture
from pipeline.viewing.samples import feature_colours, spread
from tests.e2e.support import good_sample, write_tar
from tests.pipeline.compute.support import make_config, open_store


def make(folder: Path, name: str, **options: object) -> str:
    """A store of two tars of five samples, of which one cannot be decoded and one key is in both."""
    for tar in "ab":
        members = [member for n in range(5) for member in good_sample("same" if n == 4 else f"{tar}{n}", n)]
        write_tar(folder / f"{tar}.tar", [(path, b"" if path == "a1.jpg" else data) for path, data in members])
    store = open_store(make_config(folder / "*.tar", folder / name, labels=("seg",), **options))
    store.run()
    return store.config.out


@pytest.fixture(scope="module")
def pca(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("pca"), "small", pca=8, output_size=Size(32, 48))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All channels, and no image."""
    return make(tmp_path_factory.mktemp("bare"), "large", store_image=False)


def pixels(path: Path | str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def panels(picture: NDArray[np.uint8], height: int) -> list[NDArray[np.uint8]]:
    """The panels of the first line of a picture, cut at the white between them."""
    line = picture[28 : 28 + height]
    edges = np.flatnonzero(np.diff(np.r_[False, (line != 255).any((0, 2)), False]))
    return [line[:, left:right] for left, right in zip(edges[::2], edges[1::2], strict=True)]


def test_a_store_is_described(pca: str, bare: str) -> None:
    lines = list(describe_store(pca))
    assert lines[:4] == [
        f"{pca}: complete",
        "units     4 of 4 done, 0 left",
        "samples   10 = 9 ok + 1 failed + 0 left",
        "failed    1  undecodable",
    ]
    text = "\n".join(lines)
    for wanted in (
        r"backbone  test_vit, layer \d+, norm model, random weights",
        "features  4x4 to 32x48 by bilateral, 8 principal components; images at 64x64, squash",
        r"array     features  float16  16x32x48x8, chunks of 32x48x8, shards of 4 rows, 221\.2 kB",
        r"array     image     uint8    16x32x48x3, chunks of 32x48x3, shards of 4 rows, 41\.5 kB",
        r"bytes     \S+ kB stored, 276\.5 kB before compression",
        r"input     \S+/\*\.tar",
        r"sha256    [0-9a-f]{12}\.\.\. of the pca",
        r"versions  python 3\.\d+",
        r"options   .*/plan/config\.yaml",
    ):
        assert re.search(f"^{wanted}", text, re.M), wanted
    text = "\n".join(describe_store(bare))
    assert "by bilateral, 64 channels" in text
    assert "array     image" not in text


def test_the_sheet_shows_image_features_and_labels(pca: str) -> None:
    picture = contact_sheet(pca, 4)
    image, cells, features, seg = panels(picture, 192)
    assert image.shape == cells.shape == features.shape == seg.shape == (192, 288, 3), "the features' 32x48, six times"
    # The backbone's map is 4x4.
    corners = cells[::48, ::72]
    assert np.array_equal(cells, corners.repeat(48, 0).repeat(72, 1))
    assert len(np.unique(corners.reshape(-1, 3), axis=0)) > 8
    dataset = FeatureDataset(pca, ["image"])
    assert np.array_equal(image[::6, ::6], dataset[0]["image"].numpy())
    (whole, *_) = feature_colours(FeatureDataset(pca), spread(4, 9))
    assert np.array_equal(features[::6, ::6], whole)


def test_a_store_without_images_shows_features_and_labels(bare: str) -> None:
    picture = sample_picture(bare, "a0")
    _, features, seg = panels(picture, 448)
    assert features.shape == seg.shape == (448, 448, 3)
    assert len(np.unique(features.reshape(-1, 3), axis=0)) > 50
    view, nearest = similarity_picture(bare, "a0", (3, 60), count=3)
    assert len(panels(view, 192)) == 4
    assert len(nearest) == 3


def test_stored_components_are_shown_as_they_are(pca: str) -> None:
    dataset = FeatureDataset(pca)
    (one,) = feature_colours(dataset, [2])
    values = dataset[2]["features"][..., 0].numpy().ravel()
    order = np.argsort(values)
    assert (np.diff(one[..., 0].ravel()[order].astype(int)) >= 0).all(), "red follows the first component"


def test_what_resembles_a_pixel(pca: str) -> None:
    picture, nearest = similarity_picture(pca, "b0", (10, 20), count=100)
    dataset = FeatureDataset(pca)
    keys = [dataset[n]["key"] for n in range(len(dataset))]
    assert (len(nearest), nearest[0].key) == (5, "a0"), "the same photograph"
    assert nearest[0].similarity == pytest.approx(1, abs=1e-3)
    assert [one.similarity for one in nearest] == sorted((one.similarity for one in nearest), reverse=True)
    query = dataset[keys.index("b0")]["features"][10, 20].numpy()
    for one in nearest:
        vectors = dataset[one.number]["features"].numpy()
        cosines = vectors @ query / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(query)
        np.testing.assert_allclose(one.map, cosines, atol=1e-4)
        assert one.similarity == one.map[one.pixel] == one.map.max()
        assert keys[one.number] == one.key != "b0"
    image = panels(picture, 224)[0]
    stored = dataset_image(pca, keys.index("b0")).repeat(7, 0).repeat(7, 1)
    changed = np.argwhere((image != stored).any(-1))
    # The ring's middle, in pixels that are seven times as large.
    assert np.abs((changed.min(0) + changed.max(0)) / 2 - (7 * np.array([10, 20]) + 3)).max() < 2
    with pytest.raises(ConfigError, match=r"pixel 32,0 \(y, x\) is not inside the features' 32x48 \(height x width\)"):
        similarity_picture(pca, "b0", (32, 0))


def dataset_image(store: str, number: int) -> NDArray[np.uint8]:
    image: NDArray[np.uint8] = FeatureDataset(store, ["image"])[number]["image"].numpy()
    return image


def test_the_command(pca: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(tmp_path):
        assert main([pca, "--count", "2"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "picture   small-sheet.png"
        assert main([pca, "--key", "b2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("sample    b2, row 10")
        assert lines[1:] == [
            f"shard     {Path(pca).parent}/b.tar, unit 2",
            "image     60x80, to 32x48",
            "picture   small-b2.png",
        ]
        assert main([pca, "--key", "b2", "--pixel", "1,2", "--out", "p.png"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["nearest"] * 5 + ["picture"]
    assert {path.name for path in tmp_path.iterdir()} == {"small-sheet.png", "small-b2.png", "p.png"}
    assert all(pixels(path).ndim == 3 for path in tmp_path.iterdir())
    assert main([pca, "--failed"]) == 0
    assert capsys.readouterr().out.startswith(f"a1\t{Path(pca).parent}/a.tar\tundecodable\t")
    assert main([pca, "--failed", "truncated"]) == 0
    assert capsys.readouterr().out == ""


def test_what_cannot_be_shown_is_one_line(pca: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "x.png")]
    for words, text in (
        ([pca, "--key", "same", *out], r"has 2 samples 'same', of the shards .*a\.tar, .*b\.tar; say which"),
        ([pca, "--key", "a1", *out], r"sample 'a1' failed: undecodable \(shard .*a\.tar\)"),
        ([pca, "--key", "none", *out], "has no sample 'none'"),
        ([str(tmp_path / "none"), *out], "StoreError: no feature store at"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith("show: ")
        assert error.count("\n") == 1
        assert re.search(text, error), error
    assert main([pca, "--key", "same", "--shard", "b.tar", *out]) == 0
    for words, text in (
        (["--pixel", "1,2"], "give its --key as well"),
        (["--key", "a0", "--pixel", "1"], "'1' must be two whole numbers, Y,X"),
    ):
        with pytest.raises(SystemExit):
            main([pca, *words])
        assert text in capsys.readouterr().err


def test_pictures_never_go_into_the_store(pca: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pca)
    for out in (f"{pca}/x.png", f"{pca}/plan/x.png", str(tmp_path / "link" / "x.png")):
        with pytest.raises(ConfigError, match="lies inside of the store"):
            picture_place(pca, out)
    with contextlib.chdir(pca), pytest.raises(ConfigError, match="lies inside of the store"):
        picture_place(".", None, "sheet")
    with pytest.raises(ConfigError, match=r"a PNG file is written; give a name that ends in \.png"):
        picture_place(pca, "x.jpg")
    with pytest.raises(ConfigError, match="there is no folder"):
        picture_place(pca, str(tmp_path / "none" / "x.png"))
    assert picture_place("s3://bucket/out/train/", None, "a/b c", 1, 2) == "train-a_b_c-1-2.png"
    assert picture_place(pca, None, "sheet") == "small-sheet.png"


def test_a_store_whose_job_has_not_ended_is_shown(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [member for n in range(6) for member in good_sample(f"k{n}", n)])
    store = open_store(make_config(tmp_path / "a.tar", tmp_path / "out"))
    with pytest.raises(ConfigError, match="holds no sample that could be shown; see featup status"):
        contact_sheet(store.config.out)
    store.run(units=1)
    assert f"{tmp_path}/out: stopped" in list(describe_store(store.config.out))
    assert contact_sheet(store.config.out).ndim == 3
    assert sample_picture(store.config.out, "k3").ndim == 3
    with pytest.raises(LookupError, match="has no sample 'k5'"):
        sample_picture(store.config.out, "k5")


def test_a_store_of_before_the_option_is_shown(tmp_path: Path) -> None:
    out = make(tmp_path, "old", store_image=False)
    place = Path(out, "features.zarr", "zarr.json")
    group = json.loads(place.read_text())
    attributes = group["attributes"]
    del attributes["layout"]["image"], attributes["config"]["store_image"], attributes["identity"]["store_image"]
    place.write_text(json.dumps(group))
    assert "array     image" not in "\n".join(describe_store(out))
    assert len(panels(sample_picture(out, "a0"), 448)) == 3


def test_nothing_is_at_a_place_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no feature store at"):
        list(describe_store(str(tmp_path)))
    assert os.listdir(tmp_path) == []


def test_padding_is_black_and_resembles_nothing(tmp_path: Path) -> None:
    out = make(tmp_path, "padded", geometry="pad", pca=8)
    image, _, features, _ = panels(sample_picture(out, "a0"), 448)
    valid = FeatureDataset(out, ["valid"])[0]["valid"].numpy().repeat(7, 0).repeat(7, 1)
    assert valid.any(1).sum() == 7 * 48, "60x80 in 64x64"
    assert not features[~valid].any()
    assert features[valid].any(-1).mean() > 0.9
    assert image[~valid].any()
    _, nearest = similarity_picture(out, "a0", (30, 30), count=3)
    assert all(np.isnan(one.map[:8]).all() and np.isfinite(one.map[8:56]).all() for one in nearest)
    with pytest.raises(ConfigError, match=r"pixel 2,30 \(y, x\) of a0 is padding"):
        similarity_picture(out, "a0", (2, 30))


@pytest.mark.parametrize(("count", "total", "wanted"), [(3, 9, [0, 3, 6]), (5, 3, [0, 1, 2]), (1, 1, [0]), (2, 0, [])])
def test_samples_are_spread_over_the_store(count: int, total: int, wanted: list[int]) -> None:
    assert spread(count, total) == wanted

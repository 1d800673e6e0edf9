"""The image beside the features: on their pixels, one more array of a unit, and no part of stores of before."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.compute.estimate import estimate
from pipeline.compute.source_check import check_source
from pipeline.errors import ConfigError, StoreMismatchError
from pipeline.options import Size
from pipeline.store.layout import open_arrays, stored_layout
from pipeline.store.provenance import stored_config
from pipeline.store.verify import verify_unit
from tests.e2e.support import array_files, encode, good_sample, write_tar
from tests.pipeline.compute.support import Store, make_config, open_store


def begin(folder: Path, out: str = "out", **options: object) -> Store:
    return open_store(make_config(folder / "*.tar", folder / out, labels=("seg",), **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tar of six samples, of which the second cannot be decoded."""
    members = [member for n in range(6) for member in good_sample(f"k{n}", n)]
    write_tar(tmp_path / "a.tar", [(name, b"no image" if name == "k1.jpg" else data) for name, data in members])
    return tmp_path


def images(store: Store) -> np.ndarray:
    return np.asarray(open_arrays(store.config.out, ["image"])["image"][:])


def test_the_image_is_stored_with_its_unit(folder: Path) -> None:
    store = begin(folder)
    assert (store.run().ok, store.layout.image) == (5, True)
    stored = images(store)
    assert stored.shape == (8, 64, 64, 3)
    for unit, rows in ((0, [0, 2, 3]), (1, [4, 5])):
        loaded = store.load(unit)
        assert np.array_equal(stored[rows], loaded.blocks["image"][[row - 4 * unit for row in rows]])
    assert not stored[[1, 6, 7]].any(), "failed samples and holes hold nothing"
    for unit in range(2):
        receipt = store.ledger.get(store.plan.unit(unit), store.plan.shards[0].digest)
        assert receipt is not None
        assert [one is None for one in receipt.checksums["image"]] == [s.status != "ok" for s in receipt.samples]
        assert verify_unit(store.config.out, store.plan, unit, check_source).problems == ()
    group = zarr.open_group(folder / "out" / "features.zarr", mode="r+")
    group["image"][3, 5, 5] = 255 - stored[3, 5, 5]  # type: ignore[index]
    (problem,) = verify_unit(store.config.out, store.plan, 0).problems
    assert problem.startswith("image row 3 (k3): crc32c ")


@pytest.mark.parametrize(
    ("options", "size"),
    [({"output_size": Size(32, 48)}, (32, 48)), ({"output_size": Size(96, 80), "geometry": "pad"}, (96, 80))],
    ids=["smaller", "larger"],
)
def test_the_image_lies_on_the_pixels_of_features_and_labels(
    tmp_path: Path, options: dict[str, object], size: tuple[int, int]
) -> None:
    """Its size is the features', where images are decoded larger for the backbone as well."""
    pixels, label = np.zeros((120, 160, 3), np.uint8), np.zeros((120, 160), np.uint8)
    pixels[30:, 50:], label[30:, 50:] = 255, 1
    write_tar(tmp_path / "a.tar", [("k.png", encode(pixels, "PNG")), ("k.seg.png", encode(label, "PNG"))])
    store = begin(tmp_path, **options)
    store.run()
    assert store.load(0).blocks["image"].shape[1:3] == ((64, 64) if "geometry" not in options else size)
    image, seg = images(store)[0], np.asarray(open_arrays(store.config.out, ["seg"])["seg"][0])
    assert image.shape == (*size, 3)
    known = seg != 255
    assert np.mean((image[..., 0] > 127)[known] == (seg == 1)[known]) > 0.99


def test_without_the_option_there_is_no_image(folder: Path) -> None:
    store = begin(folder, store_image=False)
    assert store.run().ok == 5
    assert not (folder / "out" / "features.zarr" / "image").exists()
    assert verify_unit(store.config.out, store.plan, 0, check_source).problems == ()
    with pytest.raises(StoreMismatchError, match="store_image: the store has False, this run has True"):
        begin(folder, store_image=True)


def test_growth_and_interruption_give_the_same_image(folder: Path) -> None:
    store = begin(folder)
    store.run(units=1)
    write_tar(folder / "b.tar", [member for n in range(3) for member in good_sample(f"b{n}", 20 + n)])
    begin(folder).run()
    begin(folder, "whole").run()
    assert array_files(folder / "out") == array_files(folder / "whole")
    assert any(name.startswith("image/c/") for name in array_files(folder / "out"))


OPTIONS = ("store_image", "codec")


def forget(out: Path) -> None:
    """What a program wrote that did not know the options, and had larger tiles by default."""
    place = out / "features.zarr" / "zarr.json"
    group = json.loads(place.read_text())
    attributes = group["attributes"]
    for part, names in {"layout": ("image", "codec"), "config": OPTIONS, "identity": OPTIONS}.items():
        for name in names:
            del attributes[part][name]
    place.write_text(json.dumps(group))


def forget_tile(out: Path) -> None:
    """The tile was the default one of a program before."""
    place = out / "features.zarr" / "zarr.json"
    group = json.loads(place.read_text())
    for part in ("config", "identity"):
        group["attributes"][part]["tile"] = None
    place.write_text(json.dumps(group))


def test_a_store_of_before_the_option_is_finished_without_an_image(folder: Path) -> None:
    begin(folder, store_image=False, codec="zstd", compression_level=3, tile=32).run(units=1)
    forget(folder / "out")
    forget_tile(folder / "out")
    resumed = begin(folder, compression_level=3)
    assert resumed.lines == [
        f"{folder}/out was made before there was the option {option}, and goes on as it is: {option}={value}"
        for option, value in (("store_image", False), ("codec", "zstd"))
    ]
    assert (resumed.layout.tile, resumed.layout.codec) == ((32, 32), "zstd")
    assert (resumed.config.store_image, resumed.layout.image) == (False, False)
    assert resumed.run().ok == 5
    assert not (folder / "out" / "features.zarr" / "image").exists()
    begin(folder, "whole", store_image=False, codec="zstd", compression_level=3, tile=32).run()
    assert array_files(folder / "out") == array_files(folder / "whole")
    config, _ = stored_config(resumed.config.out)
    assert not config.store_image
    assert not stored_layout(resumed.config.out).image
    assert verify_unit(resumed.config.out, resumed.plan, 1, check_source).problems == ()
    # It grows as well, and says no where it was asked for no image.
    write_tar(folder / "b.tar", [member for n in range(2) for member in good_sample(f"b{n}", 20 + n)])
    assert begin(folder, compression_level=3).run().ok == 7
    assert begin(folder, store_image=False, codec="zstd", compression_level=3).lines == []


def test_the_dry_run_counts_the_image(folder: Path) -> None:
    config = make_config(folder / "*.tar", folder / "out", labels=("seg",))
    (line,) = [line for line in estimate(config).splitlines() if line.startswith("bytes:    image")]
    assert line.split() == ["bytes:", "image", "73.7", "kB", "before", "compression"]
    assert "bytes:    image" not in estimate(replace(config, store_image=False))
    begin(folder, store_image=False)
    forget(folder / "out")
    text = estimate(config)
    assert text.startswith("store:    ")
    assert "bytes:    image" not in text


def test_a_level_of_compression_is_for_zstd(folder: Path) -> None:
    text = "compression_level=2 is of zstd, and codec='lz4' has one level; give --codec zstd with it"
    with pytest.raises(ConfigError, match=text):
        begin(folder, compression_level=2)
    begin(folder, compression_level=2, codec="zstd")

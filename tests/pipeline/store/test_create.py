import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import zarr

from pipeline.config.base import Size, describe
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import IncompleteStoreError, StoreError, StoreFormatError, StoreMismatchError
from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey
from pipeline.loader.dataset import FeatureDataset
from pipeline.store.create import create_store, declare_complete, grow_store, withdraw_complete
from pipeline.store.layout import (
    FORMAT,
    FORMAT_VERSION,
    OK,
    OLDEST_FORMAT_VERSION,
    open_arrays,
    open_group,
    read_attributes,
    stored_layout,
)
from pipeline.store.provenance import stored_config, stored_pca
from pipeline.store.writer import StoreWriter
from tests.pipeline.store.test_layout import IDENTITY, KEYS, LAYOUT, objects, unit_blocks


def test_creating_twice_changes_nothing(url: str) -> None:
    create_store(url, LAYOUT, IDENTITY)
    blocks = unit_blocks(LAYOUT, (OK, OK))
    StoreWriter(url, LAYOUT).write(KEYS[0], blocks)
    before = {name: storage.read_bytes(storage.join(url, name)) for name in storage.list_files(url)}
    create_store(url, LAYOUT, {**IDENTITY, "versions": {"torch": "99"}})
    assert {name: storage.read_bytes(storage.join(url, name)) for name in storage.list_files(url)} == before


def test_a_store_of_another_identity_is_refused_with_the_differences(url: str) -> None:
    create_store(url, LAYOUT, IDENTITY)
    StoreWriter(url, LAYOUT).write(KEYS[0], unit_blocks(LAYOUT, (OK,)))
    before = objects(url)
    other = {"identity": {"backbone": "resnet18", "input digest": "abc", "pca digest": "def"}}
    with pytest.raises(StoreMismatchError) as caught:
        create_store(url, dataclasses.replace(LAYOUT, channels=5, rows=12), other)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{url} was made with other settings:"
    assert lines[1:-1] == [
        "  channels: the store has 3, this run has 5",
        "  backbone: the store has 'resnet50', this run has 'resnet18'",
        "  pca digest: the store has None, this run has 'def'",
    ]
    assert lines[-1] == "Finish it with the settings it was made with, or give another --out."
    assert objects(url) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "featup-datasets/1"}, r"was made before format 2 \(it is of featup-datasets/1\).*make it again"),
        ({"format_version": FORMAT_VERSION + 1}, rf"format version {FORMAT_VERSION + 1}, .* a newer program .* update"),
        ({"format_version": OLDEST_FORMAT_VERSION - 1}, r"format version 1, this program reads 2 to .*make it again"),
        ({"format_version": "2"}, r"format version '2', this program reads 2 to"),
    ],
    ids=["first", "newer", "older", "text"],
)
def test_a_store_of_another_format_is_refused_in_one_line(local: str, changes: dict[str, object], text: str) -> None:
    open_group(local, mode="r+").attrs.update(changes)
    for act in (
        stored_layout, stored_config, stored_pca, withdraw_complete, declare_complete, FeatureDataset,
        lambda url: create_store(url, LAYOUT, IDENTITY), lambda url: grow_store(url, LAYOUT),
    ):  # fmt: skip
        with pytest.raises(StoreFormatError, match=text) as caught:
            act(local)
        assert "\n" not in str(caught.value)


def test_an_option_that_the_store_does_not_know_has_its_default(local: str) -> None:
    newer = {"identity": {**IDENTITY["identity"], "window": 7}}
    with pytest.raises(StoreMismatchError, match="window: the store has None, this run has 7"):
        create_store(local, LAYOUT, newer)
    create_store(local, LAYOUT, newer, defaults={"window": 7, "of another job": 1, "backbone": "vit"})
    with pytest.raises(StoreMismatchError, match="window: the store has 8, this run has 7"):
        create_store(local, LAYOUT, newer, defaults={"window": 8})


def test_fields_of_the_layout_are_read_by_name(local: str) -> None:
    group = open_group(local, mode="r+")
    layout = dict(group.attrs["layout"])  # type: ignore[arg-type]
    group.attrs["layout"] = {**layout, "curve": "hilbert"}
    with pytest.raises(StoreFormatError, match=r"layout has \['curve'\], which this program does not know: .*update"):
        stored_layout(local)
    del layout["tile"]
    group.attrs["layout"] = layout
    with pytest.raises(StoreFormatError, match=r"layout lacks \['tile'\]: it is damaged"):
        stored_layout(local)


def test_a_config_with_fewer_options_has_defaults_and_with_more_is_refused(local: str) -> None:
    config = PrecomputeConfig(shards=("a.tar",), out=local, size=Size(6, 10), pca=2)
    values = describe(config)
    del values["mantissa_bits"], values["limit"]
    group = open_group(local, mode="r+")
    group.attrs.update({"config": values, "setup": {}})
    assert stored_config(local, partial=True) == (config, {})
    with pytest.raises(IncompleteStoreError, match="is not complete"):
        stored_config(local)
    group.attrs["config"] = {**values, "window": 7}
    with pytest.raises(StoreFormatError, match=r"made with the options \['window'\], which this program does not know"):
        stored_config(local, partial=True)


def complete(url: str) -> object:
    return (read_attributes(url) or {})["complete"]


def test_a_store_says_whether_it_is_complete(url: str) -> None:
    create_store(url, LAYOUT, IDENTITY)
    assert complete(url) is False
    withdraw_complete(url)
    declare_complete(url)
    assert complete(url) is True
    assert zarr.open_group(storage.join(url, "features.zarr"), mode="r").attrs["complete"] is True
    declare_complete(url)
    create_store(url, LAYOUT, IDENTITY)
    assert complete(url) is True
    withdraw_complete(url)
    assert complete(url) is False
    for act in (withdraw_complete, declare_complete):
        with pytest.raises(StoreError, match="no feature store at"):
            act(storage.join(url, "none"))


def test_what_is_changed_of_an_older_store_is_of_this_version(local: str) -> None:
    # As a program of the next version will find the stores of this one.
    group = open_group(local, mode="r+")
    before = dict(group.attrs)
    group.attrs["format_version"] = OLDEST_FORMAT_VERSION
    withdraw_complete(local)
    assert read_attributes(local) == {**before, "format_version": FORMAT_VERSION}


LONGER = dataclasses.replace(LAYOUT, rows=16)


def test_a_store_that_grew_is_as_if_it_had_been_made_so(tmp_path: Path) -> None:
    found = []
    for name in ("grown", "whole"):
        store = str(tmp_path / name)
        create_store(store, LAYOUT if name == "grown" else LONGER, IDENTITY)
        for unit in range(4):
            if unit == 2:
                grow_store(store, LONGER)
            key = UnitKey(unit, 0, 4 * unit, 4 * unit + 4, 4 * unit)
            StoreWriter(store, LONGER if unit >= 2 else LAYOUT).write(key, unit_blocks(LONGER, (OK,) * 4, unit))
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        found.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert found[0] == found[1]


def test_growing_keeps_the_rows_that_are_there(url: str) -> None:
    create_store(url, LAYOUT, IDENTITY)
    StoreWriter(url, LAYOUT).write(KEYS[0], unit_blocks(LAYOUT, (OK, OK)))
    before = objects(url)
    declare_complete(url)
    grow_store(url, LAYOUT)
    assert complete(url) is True, "nothing to do"
    grow_store(url, LONGER)
    assert (stored_layout(url), complete(url), objects(url)) == (LONGER, False, before)
    assert open_arrays(url, ["status"])["status"][:].tolist() == [OK, OK] + [0] * 14  # type: ignore[union-attr]
    with pytest.raises(StoreMismatchError, match="rows: the store has 16, this run has 8; a store never shrinks"):
        grow_store(url, LAYOUT)
    with pytest.raises(StoreMismatchError, match="cannot grow to this run's layout: channels: the store has 3"):
        grow_store(url, dataclasses.replace(LONGER, rows=20, channels=4))
    create_store(url, dataclasses.replace(LAYOUT, rows=20), IDENTITY)
    assert stored_layout(url) == LONGER, "creating is no growing"


def test_growing_cut_short_is_done_again(local: str) -> None:
    # Killed after the first array: the layout still says what all arrays have.
    declare_complete(local)
    path = Path(local) / "features.zarr" / "features" / "zarr.json"
    text = path.read_text()
    path.write_text(text.replace("\n    8,\n", "\n    16,\n", 1))
    assert path.read_text() != text
    assert stored_layout(local) == LAYOUT
    grow_store(local, LONGER)
    assert stored_layout(local) == LONGER
    shapes = {array.shape[0] for _, array in open_group(local).arrays()}
    assert shapes == {16}


def test_creation_cut_short_is_repeated(local: str) -> None:
    wanted = {path: path.read_bytes() for path in Path(local).rglob("zarr.json")}
    # As it is after a kill: marked, one array made with other shapes, the others not there.
    group = open_group(local, mode="r+")
    group.attrs.put({"format": FORMAT, "format_version": FORMAT_VERSION, "creating": True})
    for name in ("seg", "status", "features"):
        shutil.rmtree(f"{local}/features.zarr/{name}")
    group.create_array("features", shape=(2, 2), dtype="i4")
    for read in (stored_layout, stored_config):
        with pytest.raises(StoreError, match=f"no feature store at {local}"):
            read(local)
    create_store(local, LAYOUT, IDENTITY)
    assert {path: path.read_bytes() for path in Path(local).rglob("zarr.json")} == wanted


def test_a_strange_zarr_group_is_refused(url: str) -> None:
    folder = storage.join(url, "features.zarr")
    zarr.create_group(folder, attributes={"title": "weather"})
    for act in (read_attributes, stored_layout, lambda url: create_store(url, LAYOUT, IDENTITY)):
        with pytest.raises(StoreError, match="is a Zarr group and not a feature store; give another --out"):
            act(url)
    assert dict(zarr.open_group(folder, mode="r").attrs) == {"title": "weather"}


def test_anything_else_in_its_place_is_refused_and_kept(tmp_path: Path) -> None:
    # Each of these was deleted, or ended in another library's error.
    def create() -> None:
        create_store(str(tmp_path), LAYOUT, IDENTITY)

    folder = tmp_path / "features.zarr"
    zarr.create_group(folder, zarr_format=2, attributes={"title": "weather"})
    with pytest.raises(StoreError, match=r"holds 2 files \(\.zattrs \.\.\.\) and no zarr\.json of a Zarr v3 group"):
        create()
    assert sorted(os.listdir(folder)) == [".zattrs", ".zgroup"]
    shutil.rmtree(folder)
    zarr.create_array(folder, shape=(3,), dtype="i4")
    with pytest.raises(StoreError, match="is not a Zarr group that can be read"):
        create()
    shutil.rmtree(folder)
    folder.mkdir()
    create()
    assert stored_layout(str(tmp_path)) == LAYOUT


def test_a_store_whose_attributes_are_lost_or_damaged_is_kept(local: str) -> None:
    StoreWriter(local, LAYOUT).write(KEYS[0], unit_blocks(LAYOUT, (OK,)))
    before, attributes = objects(local), Path(local) / "features.zarr" / "zarr.json"
    whole = attributes.read_bytes()
    attributes.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"its zarr\.json is damaged"):
        create_store(local, LAYOUT, IDENTITY)
    attributes.unlink()
    with pytest.raises(StoreError, match="or is a store that lost that file, and creating a store would delete it"):
        create_store(local, LAYOUT, IDENTITY)
    attributes.write_bytes(whole)
    create_store(local, LAYOUT, IDENTITY)
    assert objects(local) == before


def test_no_store_says_so(tmp_path: Path) -> None:
    url = str(tmp_path / "none")
    assert read_attributes(url) is None
    for act in (stored_layout, stored_config, open_group, lambda url: open_arrays(url, ["features"])):
        with pytest.raises(StoreError, match=rf"no feature store at {url}.*give the folder that was --out"):
            act(url)


def test_the_layout_and_the_config_read_back(tmp_path: Path) -> None:
    url = str(tmp_path)
    config = PrecomputeConfig(shards=("a.tar",), out=url, size=Size(6, 10), mean=(0.5, 0.25, 0.125))
    setup = {"channels": 3, "mean": [0.5, 0.25, 0.125]}
    create_store(url, LAYOUT, {**IDENTITY, "config": describe(config), "setup": setup})
    assert stored_layout(url) == LAYOUT
    assert stored_config(url, partial=True) == (config, setup)
    text = json.loads((tmp_path / "features.zarr" / "zarr.json").read_text())
    assert text["attributes"]["config"]["size"] == "6x10"

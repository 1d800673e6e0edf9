"""A store is held to the options of the upsampler it uses, and not to those of others, whose defaults may change."""

import json
from pathlib import Path

import pytest

from pipeline.errors import StoreFormatError, StoreMismatchError
from pipeline.store.provenance import describe_features, read_features, stored_config
from tests.e2e.support import good_sample, write_tar
from tests.pipeline.compute.support import Store, make_config, open_store

# What a program before multiview recorded.
OLDER = {"fit_base": "bilateral", "fit_steps": 20, "fit_views": 32, "sigma_space": 1.0, "sigma_colour": 0.2}
NEWER = ("fit_lr", "implicit_preset", "views", "view_base", "held_out_views", "feature_components", "sigma_feature")
NEWER += ("sigma_coarse",)


def begin(folder: Path, **options: object) -> Store:
    return open_store(make_config(folder / "*.tar", folder / "out", **options))


def make_older(folder: Path) -> None:
    """As if an older program had begun the store."""
    place = folder / "out" / "features.zarr" / "zarr.json"
    group = json.loads(place.read_text())
    for part in ("config", "identity"):
        group["attributes"][part] |= OLDER
        for name in NEWER:
            del group["attributes"][part][name]
    place.write_text(json.dumps(group))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tar(tmp_path / "a.tar", [member for n in range(6) for member in good_sample(f"k{n}", n)])
    return tmp_path


def test_options_of_other_upsamplers_may_change(folder: Path) -> None:
    begin(folder, upsampler="bilinear").run(units=1)
    make_older(folder)
    resumed = begin(folder, upsampler="bilinear", views=4, sigma_feature=0.3)
    assert resumed.run().ok == 6
    config, _ = stored_config(resumed.config.out)
    assert config.upsampler == "bilinear"
    features = describe_features(resumed.config.out)
    features["options"]["fit_base"] = "bilateral"  # As in a probe that an older program trained.
    assert read_features(features, None, None).upsampler == "bilinear"
    features["options"]["upsampler"] = "implicit"
    with pytest.raises(StoreFormatError, match="an average of views that is now multiview"):
        read_features(features, None, None)


def test_options_of_its_own_may_not(folder: Path) -> None:
    begin(folder, upsampler="bilateral", feature_components=0, same_resolution_stages=0).run(units=1)
    make_older(folder)
    with pytest.raises(StoreMismatchError, match=r"settings: sigma_colour: .*; sigma_space: the store has 1\.0"):
        begin(folder, upsampler="bilateral", same_resolution_stages=0)
    own = {"sigma_space": 1.0, "sigma_colour": 0.2, "same_resolution_stages": 0}
    resumed = begin(folder, upsampler="bilateral", **own)
    assert (resumed.config.feature_components, resumed.config.sigma_coarse) == (0, 1.0)
    assert resumed.run().ok == 6

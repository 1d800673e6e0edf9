"""Weights that timm downloads are fetched once, into the store."""

from pathlib import Path

import pytest
import safetensors.torch

from featup.backbones import create_backbone
from pipeline.compute.models import keep_weights, weights_place
from pipeline.errors import StoreError, StoreMismatchError
from tests.e2e.support import good_sample, write_tar
from tests.pipeline.compute.support import make_config, open_store


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """What a hub would give: timm loads it by the same way as what it downloads."""
    path = tmp_path / "hub" / "test_vit.safetensors"
    path.parent.mkdir()
    state = create_backbone("test_vit", seed=7).model.state_dict()
    safetensors.torch.save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    return path


def test_actors_and_later_runs_ask_no_hub(tmp_path: Path, published: Path) -> None:
    write_tar(tmp_path / "a.tar", [member for n in range(4) for member in good_sample(f"k{n}", n)])
    hub = {"pretrained_cfg_overlay": {"file": str(published)}}
    config = make_config(tmp_path / "a.tar", tmp_path / "out", pretrained=True, backbone_kwargs=hub, rows_per_shard=2)
    store = open_store(config)
    assert store.setup.digests["backbone"] == create_backbone("test_vit", seed=7).digest
    published.unlink()
    store.run(units=1)
    assert open_store(config).run().ok == 4
    place = weights_place(config)
    assert place is not None
    assert Path(place) == tmp_path / "out" / "plan" / "backbone.safetensors"


def test_replaced_weights_are_refused_wherever_they_are_read(tmp_path: Path, published: Path) -> None:
    write_tar(tmp_path / "a.tar", [member for n in range(4) for member in good_sample(f"k{n}", n)])
    hub = {"pretrained_cfg_overlay": {"file": str(published)}}
    config = make_config(tmp_path / "a.tar", tmp_path / "out", pretrained=True, backbone_kwargs=hub, rows_per_shard=2)
    store = open_store(config)
    store.run(units=1)
    other = create_backbone("test_vit", seed=8).model.state_dict()
    place = tmp_path / "out" / "plan" / "backbone.safetensors"
    safetensors.torch.save_file({name: value.contiguous().clone() for name, value in other.items()}, place)
    with pytest.raises(StoreError, match="the store was made for"):
        store.processor()
    with pytest.raises(StoreMismatchError, match="backbone digest"):
        open_store(config)


def test_nothing_is_kept_of_weights_that_are_given_or_random(tmp_path: Path) -> None:
    assert keep_weights(make_config("a.tar", tmp_path / "out")) is None
    assert keep_weights(make_config("a.tar", tmp_path / "out", weights="w.safetensors", pretrained=True)) is None

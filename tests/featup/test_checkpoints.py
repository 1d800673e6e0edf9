"""Checkpoints: what is saved comes back, official stacks load, everything else is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from featup.backbones import create_backbone
from featup.checkpoints import (
    CHECKPOINT_FORMAT,
    check_backbone,
    load_jbu,
    load_pca,
    load_upsampler,
    pca_bytes,
    upsampler_bytes,
)
from featup.errors import GeometryError, WeightsError
from featup.projection import PCA, PCAFit
from featup.upsamplers import CARAFE, IFA, JBU, SAPA, ResizeConv, Upsampler, create_trainable, create_upsampler
from tests.featup.support import random

CHANNELS = 6
PARTS = {
    "range_in": "range_proj.0",
    "range_out": "range_proj.3",
    "fixup_in": "fixup_proj.0",
    "fixup_out": "fixup_proj.3",
}


def random_jbu(**options: Any) -> JBU:
    jbu = JBU(CHANNELS, **options)
    with torch.no_grad():
        for place, parameter in enumerate(jbu.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=place))
    return jbu.eval().requires_grad_(False)


def save(path: Path, upsampler: Upsampler, **provenance: Any) -> None:
    path.write_bytes(upsampler_bytes(upsampler, **provenance))


def official(jbu: JBU, prefix: str = "upsampler.") -> dict[str, Tensor]:
    """The stack under the names and shapes of FeatUp's own checkpoints: layers are 1x1 convolutions."""
    state = {}
    for name, tensor in jbu.state_dict().items():
        if name.startswith("fixup."):
            place = f"fixup_proj.1.{name.removeprefix('fixup.')}"
        else:
            _, stage, rest = name.split(".", 2)
            layer, _, leaf = rest.rpartition(".")
            place = f"up{int(stage) + 1}.{PARTS[layer]}.{leaf}" if layer else f"up{int(stage) + 1}.{rest}"
        state[prefix + place] = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
    return state


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the official training writes: the backbone and the downsampler are in the same state dict."""
    others = {"model.0.model.cls_token": random(1, 1, 4), "downsampler.kernel": random(7), "n_dim": torch.tensor(6)}
    return {"epoch": 1, "global_step": 2000, "state_dict": {**others, **state}, "optimizer_states": [], "callbacks": {}}


def results(jbu: JBU) -> Tensor:
    image = torch.randint(0, 256, (1, 21, 17, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    result: Tensor = jbu(random(1, 3, 4, CHANNELS), image, (5, 8))
    return result


def same_jbu(found: JBU, expected: JBU) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    for name in ("channels", "key_dim", "radius", "guidance_mean", "guidance_std"):
        assert getattr(found, name) == getattr(expected, name), name
    assert torch.equal(results(found), results(expected))
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("prefix", ["upsampler.", ""], ids=["prefix", "bare"])
@pytest.mark.parametrize("options", [{}, {"stages": 2, "key_dim": 5, "radius": 1}], ids=["usual", "small"])
def test_official_checkpoint(tmp_path: Path, prefix: str, options: dict[str, int]) -> None:
    jbu = random_jbu(**options)
    torch.save(lightning(official(jbu, prefix)), tmp_path / "jbu.ckpt")
    same_jbu(load_jbu(tmp_path / "jbu.ckpt"), jbu)


def test_official_names_are_those_of_featup() -> None:
    """So that the round trip above does not rest on a mistake made twice."""
    names = official(random_jbu())
    assert {"upsampler.up1.range_temp", "upsampler.up4.sigma_spatial", "upsampler.fixup_proj.1.weight"} <= names.keys()
    assert names["upsampler.up2.range_proj.0.weight"].shape == (32, 3, 1, 1)
    assert names["upsampler.up2.fixup_proj.3.weight"].shape == (49, 49, 1, 1)
    assert len(names) == 4 * 10 + 2


def test_official_half_precision_is_read_as_float(tmp_path: Path) -> None:
    jbu = random_jbu()
    torch.save({"state_dict": {k: v.half() for k, v in official(jbu).items()}}, tmp_path / "jbu.ckpt")
    found = load_jbu(tmp_path / "jbu.ckpt")
    for name, value in jbu.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.half().float()), name


def test_jbu_round_trip(tmp_path: Path) -> None:
    options = {
        "stages": 3,
        "key_dim": 7,
        "radius": 2,
        "guidance_mean": (0.5, 0.4, 0.3),
        "guidance_std": (0.3, 0.2, 0.1),
    }
    jbu = random_jbu(**options)
    save(tmp_path / "jbu.safetensors", jbu, backbone="vit", steps=[2000])
    same_jbu(load_jbu(str(tmp_path / "jbu.safetensors")), jbu)
    with safe_open(tmp_path / "jbu.safetensors", framework="pt") as file:
        assert '"backbone": "vit"' in file.metadata()["featup"]


def test_the_distance_kernel_of_older_files_is_refused(tmp_path: Path) -> None:
    """It was called jbu and is a filter that needs no training."""
    description = {"channels": CHANNELS, "stages": 4, "key_dim": 32, "radius": 3, "kernel": "distance"}
    description |= {"guidance_mean": [0.5] * 3, "guidance_std": [0.5] * 3, "feature_keys": 8, "coarse_stages": 2}
    text = json.dumps({"format": CHECKPOINT_FORMAT, "kind": "jbu", **description})
    save_file({"stages.0.range_temp": torch.tensor(0.0)}, tmp_path / "jbu.safetensors", {"featup": text})
    with pytest.raises(WeightsError, match=r"kernel='distance'.* called 'bilateral' \(with features\), which needs no"):
        load_jbu(tmp_path / "jbu.safetensors")


def test_the_papers_kernel_of_older_files_is_read(tmp_path: Path) -> None:
    jbu = random_jbu()
    save(tmp_path / "new.safetensors", jbu)
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["featup"])
    description |= {"kernel": "projection", "feature_keys": 0, "coarse_stages": 0, "bicubic_a": -0.75}
    state = jbu.state_dict()
    save_file(state, tmp_path / "old.safetensors", {"featup": json.dumps(description)})
    same_jbu(load_jbu(tmp_path / "old.safetensors"), jbu)


def test_anyup_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    anyup = create_trainable("anyup", 5, width=16)
    path = tmp_path / "anyup.safetensors"
    path.write_bytes(upsampler_bytes(anyup, backbones=[{"name": "vit"}]))
    loaded = create_upsampler("anyup", channels=9, checkpoint=path)
    assert not loaded.training
    for name, value in anyup.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_stack_in_training_can_be_saved(tmp_path: Path) -> None:
    jbu = random_jbu().requires_grad_(True).train()
    save(tmp_path / "jbu.safetensors", jbu)
    assert jbu.training
    same_jbu(load_jbu(tmp_path / "jbu.safetensors"), jbu.eval().requires_grad_(False))


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(name)}


def with_one(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, name: random(*shape)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("upsampler."), r"no JBU stack in it; expected keys like 'upsampler\.up1\.range_temp'.* found \['down"),
        (without("upsampler.up1."), r"no JBU stack in it"),
        (without("upsampler.fixup_proj"), r"no JBU stack in it"),
        (without("upsampler.up2."), r"does not fit JBU; missing from it \(10\): stages\.1\.range_temp"),
        (without("upsampler.up3.sigma_spatial"), r"missing from it \(1\): stages\.2\.sigma_spatial"),
        (with_one("upsampler.up2.attention.weight", 3), r"unexpected in it \(1\): stages\.1\.attention\.weight"),
        (with_one("upsampler.up1.fixup_proj.0.weight", 49, 50, 1, 1), r"float32\[49, 50\] for float32\[49, 52\]"),
        (with_one("upsampler.up3.range_proj.3.weight", 32, 16, 1, 1), r"float32\[32, 16\] for float32\[32, 32\]"),
        (with_one("upsampler.fixup_proj.1.weight", 6, 7, 1, 1), r"fixup\.weight float32\[6, 7\] for float32\[6, 6\]"),
        (with_one("upsampler.up1.fixup_proj.3.bias", 25), r"of another shape or kind"),
    ],
    ids=["none", "no-first", "no-end", "hole", "parameter", "unknown", "fixup", "range", "end", "window"],
)
def test_official_checkpoints_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], text: str
) -> None:
    content = lightning(official(random_jbu()))
    torch.save({**content, "state_dict": change(content["state_dict"])}, tmp_path / "jbu.ckpt")
    with pytest.raises(WeightsError, match=rf"jbu\.ckpt.*{text}"):
        load_jbu(tmp_path / "jbu.ckpt")


@pytest.mark.parametrize("taps", [0, 1, 16, 48])
def test_official_windows_that_are_none(tmp_path: Path, taps: int) -> None:
    state = with_one("upsampler.up1.fixup_proj.3.bias", taps)(official(random_jbu()))
    torch.save({"state_dict": state}, tmp_path / "jbu.ckpt")
    with pytest.raises(
        WeightsError, match=rf"jbu\.ckpt: its first stage corrects {taps} taps, which is no square window"
    ):
        load_jbu(tmp_path / "jbu.ckpt")


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_damaged_jbu(tmp_path: Path, suffix: str, size: int) -> None:
    path = tmp_path / f"jbu{suffix}"
    if suffix == ".ckpt":
        torch.save(lightning(official(random_jbu())), path)
    else:
        save(path, random_jbu())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        WeightsError, match=rf"jbu{suffix}: (not a whole safetensors file|cannot be read by torch\.save)"
    ):
        load_jbu(path)


def test_missing_files_are_missing(tmp_path: Path) -> None:
    for load in (load_jbu, load_pca):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "none.safetensors")


def fitted() -> PCA:
    fit = PCAFit(CHANNELS)
    fit.add(random(50, CHANNELS))
    return fit.solve(3)


def test_pca_round_trip(tmp_path: Path) -> None:
    pca = fitted()
    path = tmp_path / "pca.safetensors"
    path.write_bytes(pca_bytes(pca, backbone="vit", layer=11))
    found = load_pca(path)
    for name in ("components", "mean", "variance"):
        assert torch.equal(getattr(found, name), getattr(pca, name)), name
    assert (found.explained_variance_ratio, found.count) == (pca.explained_variance_ratio, 50)
    assert pca_bytes(pca, backbone="vit", layer=11) == path.read_bytes(), "the same PCA gives the same bytes"


def test_pca_damaged(tmp_path: Path) -> None:
    path = tmp_path / "pca.safetensors"
    path.write_bytes(pca_bytes(fitted())[:-1])
    with pytest.raises(WeightsError, match=r"pca\.safetensors: not a whole safetensors file .*; write it again"):
        load_pca(path)


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "pca.safetensors").write_bytes(pca_bytes(fitted()))
    save(tmp_path / "jbu.safetensors", random_jbu())
    with pytest.raises(WeightsError, match=r"expected a jbu in format featup-datasets/1, found kind='pca'"):
        load_jbu(tmp_path / "pca.safetensors")
    with pytest.raises(WeightsError, match=r"expected a pca in format featup-datasets/1, found kind='jbu'"):
        load_pca(tmp_path / "jbu.safetensors")


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        (None, r"kind=None format=None"),
        ({"format": "pt"}, r"kind=None format=None"),
        ({"featup": '{"format": "featup-datasets/2", "kind": "jbu"}'}, r"kind='jbu' format='featup-datasets/2'"),
    ],
    ids=["none", "transformers", "newer"],
)
def test_safetensors_of_others(tmp_path: Path, metadata: dict[str, str] | None, found: str) -> None:
    save_file(random_jbu().state_dict(), tmp_path / "jbu.safetensors", metadata)
    with pytest.raises(WeightsError, match=rf"expected a jbu in format featup-datasets/1, found {found}"):
        load_jbu(tmp_path / "jbu.safetensors")


def test_description_and_tensors_disagree(tmp_path: Path) -> None:
    """The description of one stack over the tensors of another."""
    save(tmp_path / "two.safetensors", random_jbu(radius=2))
    with safe_open(tmp_path / "two.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(random_jbu().state_dict(), tmp_path / "jbu.safetensors", metadata)
    with pytest.raises(WeightsError, match=r"jbu\.safetensors does not fit JBU; of another shape or kind .*\[49\]"):
        load_jbu(tmp_path / "jbu.safetensors")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            '{"format": "featup-datasets/1", "kind": "KIND"}',
            "its description lacks .*(stages, key_dim|explained, count)",
        ),
        ("not json", "its description is not a JSON object .*Expecting value"),
        ("[1]", "its description is not a JSON object"),
    ],
    ids=["lacking", "not-json", "not-an-object"],
)
@pytest.mark.parametrize("kind", ["jbu", "pca"])
def test_descriptions_that_are_none(tmp_path: Path, kind: str, text: str, error: str) -> None:
    """Bug: these came out as KeyError, JSONDecodeError and AttributeError, without the file's name."""
    path = tmp_path / "file.safetensors"
    save_file(random_jbu().state_dict(), path, {"featup": text.replace("KIND", kind)})
    load: Callable[[Path], object] = load_jbu if kind == "jbu" else load_pca
    with pytest.raises(WeightsError, match=rf"file\.safetensors: {error}"):
        load(path)


@pytest.mark.parametrize(
    "upsampler",
    [
        ResizeConv(CHANNELS, stages=3, width=5),
        CARAFE(CHANNELS, stages=2, width=5),
        SAPA(CHANNELS, stages=3, width=4, key_dim=7),
        IFA(CHANNELS, width=5),
        JBU(CHANNELS, stages=3, key_dim=7, radius=2, dropout=0.5),
    ],
    ids=lambda upsampler: upsampler.name,
)
def test_everything_that_can_be_trained_comes_back(tmp_path: Path, upsampler: Upsampler) -> None:
    with torch.no_grad():
        for place, parameter in enumerate(upsampler.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=place))
    path = tmp_path / "trained.safetensors"
    path.write_bytes(upsampler_bytes(upsampler, steps=3))
    found = create_upsampler(upsampler.name, channels=CHANNELS, checkpoint=path)  # type: ignore[arg-type]
    assert not found.training
    image = torch.randint(0, 256, (1, 11, 15, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    features = random(1, 3, 4, CHANNELS)
    upsampler.eval()
    with torch.no_grad():
        assert torch.equal(found(features, image, (11, 15)), upsampler(features, image, (11, 15)))
    other = "ifa" if upsampler.name != "ifa" else "sapa"
    with pytest.raises(WeightsError, match=rf"expected a {other} in format .*, found kind='{upsampler.name}'"):
        load_upsampler(path, other)
    with pytest.raises(GeometryError, match=f"{upsampler.name}: made for {CHANNELS} channels, got features of 7"):
        create_upsampler(upsampler.name, channels=7, checkpoint=path)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match=f"{upsampler.name} needs a trained checkpoint"):
        create_upsampler(upsampler.name, channels=CHANNELS)  # type: ignore[arg-type]


def test_a_checkpoint_for_another_backbone_is_refused(tmp_path: Path) -> None:
    backbone = create_backbone("test_vit", stride=16, image_size=(32, 48))
    path = tmp_path / "jbu.safetensors"
    known = {"name": "test_vit", "layer": backbone.layer, "digest": backbone.digest}
    for fitting in ({"backbone": known}, {"backbone": {**known, "norm": "model"}}, {"backbone": "vit"}, {}):
        save(path, random_jbu(), **fitting)
        check_backbone(path, backbone)
    check_backbone(tmp_path / "official.ckpt", backbone)
    # A JBU trained with --norm layer was taken under --norm model, with exit status 0.
    for other in ({"digest": "0123456789abcdef"}, {"layer": 1}, {"norm": "layer"}):
        save(path, random_jbu(), backbone={**known, "name": "resnet", **other})
        here = "the backbone is test_vit, layer 5, norm model"
        with pytest.raises(WeightsError, match=rf"was made for resnet, layer \d+, norm [\w ]+, with .*; {here}, with"):
            check_backbone(path, backbone)
    assert [entry.name for entry in tmp_path.iterdir()] == ["jbu.safetensors"]

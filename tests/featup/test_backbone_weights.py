"""Weights of backbones: random by a seed, from files, from timm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from featup._timm import timm
from featup.backbones import create_backbone
from featup.errors import WeightsError
from tests.featup.support import close, images, normalised, run_python


def test_random_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = create_backbone("test_vit"), create_backbone("test_vit", layer=1, norm="none")
    assert torch.equal(torch.get_rng_state(), before)
    assert first.digest == again.digest != create_backbone("test_vit", seed=1).digest
    assert torch.equal(first.model.pos_embed, again.model.pos_embed)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file of weights for test_vit_relpos, with its classifier, and what is in it."""
    torch.manual_seed(7)
    state = timm.create_model("test_vit_relpos").state_dict()
    state = {key: torch.randn_like(value) * 0.1 for key, value in state.items()}
    save_file(state, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors", state


def test_weights_are_loaded_strictly_whatever_the_layer_and_size(trained: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = trained
    native = create_backbone("test_vit_relpos", weights=path)
    other = create_backbone("test_vit_relpos", weights=path, image_size=(64, 96), layer=2)
    assert native.digest == other.digest != create_backbone("test_vit_relpos").digest
    loaded = native.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert torch.equal(other.model.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])

    save_file({key: value for key, value in state.items() if key != "blocks.1.attn.proj.bias"}, path)
    with pytest.raises(WeightsError, match=r"w\.safetensors does not fit .* \(1\): blocks\.1\.attn\.proj\.bias"):
        create_backbone("test_vit_relpos", weights=path)
    with pytest.raises(WeightsError, match="another architecture"):
        create_backbone("test_resnet", weights=path)


@pytest.mark.parametrize("classes", [0, 11])
def test_weights_may_lack_the_classifier_or_have_another(trained: tuple[Path, dict[str, Tensor]], classes: int) -> None:
    path, state = trained
    whole = create_backbone("test_vit_relpos", weights=path)
    rest = {key: value for key, value in state.items() if not key.startswith("head.")}
    assert len(rest) == len(state) - 2
    head = {"head.weight": torch.ones(11, 96), "head.bias": torch.ones(11)} if classes else {}
    save_file(rest | head, path)
    found = create_backbone("test_vit_relpos", weights=path)
    assert found.digest == whole.digest
    assert torch.equal(found(images(160, 160)), whole(images(160, 160)))


def test_weights_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="exclude each other"):
        create_backbone("test_vit", weights=tmp_path / "w.pth", pretrained=True)
    with pytest.raises(FileNotFoundError):
        create_backbone("test_vit", weights=tmp_path / "w.safetensors")


def test_a_process_of_its_own_without_network(tmp_path: Path) -> None:
    out = run_python(
        "from featup.backbones import create_backbone\n"
        "from featup.errors import WeightsError\n"
        "import sys\n"
        "print([m for m in ('ray', 'zarr', 'webdataset', 'pipeline') if m in sys.modules])\n"
        "print(create_backbone('test_vit').digest)\n"
        "for name in ('test_vit', 'mobilenetv3_large_075'):\n"
        "    try:\n"
        "        create_backbone(name, pretrained=True)\n"
        "    except WeightsError as error:\n"
        "        print(type(error.__cause__).__name__, error)",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
        TORCH_HOME=str(tmp_path),
    )
    pipeline, digest, offline, none = out.splitlines()
    assert pipeline == "[]"
    assert digest == create_backbone("test_vit").digest
    assert offline.startswith("LocalEntryNotFoundError ")
    assert "pretrained weights of test_vit (source: timm/test_vit" in offline
    assert "give weights=FILE instead" in offline
    assert "(source: none known to timm)" in none


@pytest.mark.parametrize(
    ("stem", "name", "stride", "kwargs"),
    [
        ("vit_tiny_patch16_224.codr_fp16", "vit_tiny_patch16_224", 16, {}),
        ("mobilenetv1_100.coral_quant_padsame", "mobilenetv1_100", 16, {"pad_type": "same"}),
        ("mobilenetv2_100.coral_tf2_int8_padsame", "mobilenetv2_100", 32, {"pad_type": "same"}),
    ],
)
def test_trained_weights(shared: Path, stem: str, name: str, stride: int, kwargs: dict[str, Any]) -> None:
    path = shared / "weights" / f"{stem}.safetensors"
    half = (0.5, 0.5, 0.5)
    backbone = create_backbone(name, weights=path, stride=stride, mean=half, std=half, kwargs=kwargs)
    model = timm.create_model(name, **kwargs).eval()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    pictures = images(224, 224, batch=2)
    found = backbone(pictures)
    x = normalised(pictures, half, half)
    with torch.no_grad():
        if name.startswith("vit"):
            expected = model.forward_features(x)[:, 1:].reshape(2, 14, 14, 192)
        else:
            x = model.bn1(model.conv_stem(x))
            # All blocks as deep as the stride: 512 and 320 channels, at 14x14 and at 7x7.
            for block in model.blocks[: {"mobilenetv1_100": 4, "mobilenetv2_100": 7}[name]]:
                x = block(x)
            expected = x.permute(0, 2, 3, 1)
    close(found, expected, name)

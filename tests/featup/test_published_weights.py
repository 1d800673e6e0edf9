"""Weights as their authors publish them give the features of the timm model that they were made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from featup._timm import timm
from featup.backbones import Backbone, create_backbone
from featup.errors import WeightsError
from tests.featup import authors
from tests.featup.support import close, images

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}


class Case(NamedTuple):
    name: str
    kwargs: dict[str, Any]
    publish: Callable[[dict[str, Tensor]], Any]


CASES = {
    "DINO": Case("vit_small_patch16_224.dino", SMALL, authors.dino),
    "DINO, full": Case("vit_small_patch16_224.dino", SMALL, authors.dino_full),
    "DINOv2": Case("vit_small_patch14_dinov2.lvd142m", SMALL, authors.dinov2),
    "DINOv2, SwiGLU": Case("vit_giant_patch14_dinov2.lvd142m", SMALL, authors.dinov2),
    "DINOv2, registers": Case("vit_small_patch14_reg4_dinov2.lvd142m", SMALL, authors.dinov2),
    "DINOv2, training": Case("vit_small_patch14_dinov2.lvd142m", SMALL, authors.dinov2_training),
    "DINOv3": Case("vit_small_patch16_dinov3.lvd1689m", SMALL, authors.dinov3),
    "DINOv3, biases": Case("vit_small_patch16_dinov3_qkvb.lvd1689m", SMALL, authors.dinov3),
    "DINOv3, ConvNeXt": Case("convnext_tiny.dinov3_lvd1689m", CONVNEXT, authors.convnext),
    "CLIP": Case("vit_base_patch16_clip_quickgelu_224.openai", SMALL, authors.clip),
    "OpenCLIP": Case("vit_base_patch16_clip_224.laion2b", SMALL, authors.clip),
    "OpenCLIP, training": Case("vit_base_patch16_clip_224.laion2b", SMALL, authors.open_clip_training),
    "OpenCLIP, ConvNeXt": Case("convnext_base.clip_laion2b", CONVNEXT, authors.open_clip_trunk),
    "SigLIP": Case("vit_base_patch16_siglip_224.webli", SMALL, authors.open_clip_trunk),
    "MAE": Case("vit_base_patch16_224.mae", SMALL, authors.mae),
    "DeiT": Case("deit_small_patch16_224.fb_in1k", SMALL, lambda state: {"model": state}),
    "DeiT, distilled": Case("deit_small_distilled_patch16_224.fb_in1k", SMALL, lambda state: {"model": state}),
    "DeiT III": Case("deit3_small_patch16_224.fb_in22k_ft_in1k", SMALL, authors.deit3),
    "Swin": Case("swin_tiny_patch4_window7_224.ms_in1k", SWIN, authors.swin),
    "ConvNeXt": Case("convnext_tiny.fb_in1k", CONVNEXT, authors.convnext),
    "BEiT": Case("beitv2_base_patch16_224.in1k_ft_in22k", SMALL, authors.beit),
}


def trained(name: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a timm model whose every weight is random, so that none can be forgotten unseen."""
    torch.manual_seed(3)
    state = timm.create_model(name, **kwargs).state_dict()
    return {key: torch.randn_like(value) * 0.2 if value.is_floating_point() else value for key, value in state.items()}


def timms(case: Case, state: dict[str, Tensor], folder: Path) -> Backbone:
    """The backbone with these weights under timm's own names, which are loaded without any conversion."""
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "timm.safetensors")
    return create_backbone(case.name, weights=folder / "timm.safetensors", kwargs=case.kwargs)


def features(backbone: Backbone) -> Tensor:
    return backbone(images(*(backbone.fixed_size or (224, 224 if backbone.stride[0] == 14 else 96))))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_published_weights_give_the_features_of_timms(case: Case, tmp_path: Path) -> None:
    state = trained(case.name, case.kwargs)
    torch.save(case.publish(state), tmp_path / "published.pth")
    found = create_backbone(case.name, weights=tmp_path / "published.pth", kwargs=case.kwargs)
    expected = timms(case, state, tmp_path)
    assert features(expected).std() > 0.01
    close(features(found), features(expected), "features")
    # The sum of class token and position is rounded once more; all else is only renamed.
    assert (found.digest == expected.digest) == (case.name != "vit_small_patch14_reg4_dinov2.lvd142m")


@pytest.mark.parametrize("key", ["blocks.1.attn.qkv.bias", "pos_embed", "norm.weight", "patch_embed.proj.weight"])
@pytest.mark.parametrize("kind", ["DINO, full", "DINOv2", "CLIP", "MAE"])
def test_a_weight_that_the_features_need_and_the_file_lacks(kind: str, key: str, tmp_path: Path) -> None:
    case = CASES[kind]
    state = trained(case.name, case.kwargs)
    published = case.publish({name: value for name, value in state.items() if name != key or kind == "CLIP"})
    if kind == "CLIP":
        (theirs,) = authors.renamed({key: state[key]}, *authors.CLIP_NAMES)
        del published[f"visual.{theirs}"]
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=rf"does not fit .*missing from it \(1\): {key.replace('.', '[.]')}[;.]"):
        create_backbone(case.name, weights=tmp_path / "w.pth", kwargs=case.kwargs)


def test_what_the_map_does_not_depend_on_may_be_absent(tmp_path: Path) -> None:
    case = CASES["DINOv2"]
    state = trained(case.name, case.kwargs)
    whole = timms(case, state, tmp_path)
    first = {key: value for key, value in state.items() if not key.startswith(("blocks.1.", "norm."))}
    torch.save(authors.dinov2(first), tmp_path / "w.pth")
    found, again = (
        create_backbone(case.name, weights=tmp_path / "w.pth", kwargs=case.kwargs, layer=0, seed=seed)
        for seed in (0, 1)
    )
    assert found.digest == again.digest != whole.digest
    expected = create_backbone(case.name, weights=tmp_path / "timm.safetensors", kwargs=case.kwargs, layer=0)
    close(features(found), features(expected), "features")
    with pytest.raises(WeightsError, match=r"missing from it \(14\): norm\.weight|missing from it \(16\): blocks\.1\."):
        create_backbone(case.name, weights=tmp_path / "w.pth", kwargs=case.kwargs)


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("DINOv2", {"depth": 3}, r"unexpected in it \(14\): blocks\.2\."),
        ("DINOv2", {"embed_dim": 96}, "another width"),
        ("DINOv2", {"init_values": 0}, r"missing from it \(4\): blocks\.0\.ls1\.gamma"),
        ("Swin", {"depths": (2, 4)}, r"unexpected in it .* layers\.1\.blocks\.2\."),
        ("ConvNeXt", {"dims": (8, 12, 16, 32)}, r"timm cannot convert its names \(downsample_layers"),
    ],
    ids=["deeper", "wider", "no layer scale", "deeper Swin", "wider ConvNeXt"],
)
def test_another_variant_is_refused(kind: str, changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    case = CASES[kind]
    torch.save(case.publish(trained(case.name, case.kwargs | changes)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=text):
        create_backbone(case.name, weights=tmp_path / "w.pth", kwargs=case.kwargs)


def test_registers_are_not_dropped(tmp_path: Path) -> None:
    case = CASES["DINOv2, registers"]
    torch.save(case.publish(trained(case.name, case.kwargs)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"unexpected in it .*register_tokens"):
        create_backbone("vit_small_patch14_dinov2.lvd142m", weights=tmp_path / "w.pth", kwargs=case.kwargs)


def test_another_patch_size_is_resampled_on_purpose_only(tmp_path: Path) -> None:
    torch.save(authors.dinov2(trained("vit_small_patch14_dinov2.lvd142m", SMALL)), tmp_path / "w.pth")
    name = "vit_small_patch16_224.dino"
    with pytest.raises(WeightsError, match=r"patches of 14x14 pixels, the model of 16x16.*another patch size"):
        create_backbone(name, weights=tmp_path / "w.pth", kwargs=SMALL | {"init_values": 1e-5})
    found = create_backbone(name, weights=tmp_path / "w.pth", kwargs=SMALL | {"init_values": 1e-5, "patch_size": 16})
    assert features(found).shape == (1, 14, 6, 48)


def test_positions_of_another_image_size_are_resampled_as_timm_does_it(tmp_path: Path) -> None:
    state = trained("deit_small_patch16_224", SMALL | {"img_size": 384})
    torch.save({"model": state}, tmp_path / "w.pth")
    found = create_backbone("deit_small_patch16_224", weights=tmp_path / "w.pth", kwargs=SMALL)
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], (14, 14), num_prefix_tokens=1)
    assert torch.equal(found.model.pos_embed, expected)


def test_biases_of_dinov3_are_not_dropped_unless_they_are_zero(tmp_path: Path) -> None:
    case = CASES["DINOv3, biases"]
    torch.save(case.publish(trained(case.name, case.kwargs)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.qkv\.bias is not zero.*dinov3_qkvb"):
        create_backbone("vit_small_patch16_dinov3.lvd1689m", weights=tmp_path / "w.pth", kwargs=case.kwargs)


def test_names_of_transformers_are_refused_with_what_to_give(tmp_path: Path) -> None:
    case = CASES["DINOv2"]
    save_file(authors.transformers_dinov2(trained(case.name, case.kwargs)), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"names of Hugging Face's transformers \(emb.*huggingface\.co/timm/NAME"):
        create_backbone(case.name, weights=tmp_path / "model.safetensors", kwargs=case.kwargs)


def test_googles_npz(tmp_path: Path) -> None:
    case = Case("vit_tiny_patch16_224.augreg_in21k", SMALL | {"num_classes": 0}, authors.dino)
    state = trained(case.name, case.kwargs)
    arrays = authors.google_vit(state, 3)
    np.savez(tmp_path / "w.npz", **arrays)
    found = create_backbone(case.name, weights=tmp_path / "w.npz", kwargs=case.kwargs)
    expected = timms(case, state, tmp_path)
    assert found.digest == expected.digest
    assert torch.equal(features(found), features(expected))

    for name, lacking in (
        ("Transformer/encoder_norm/bias", "encoder_norm"),
        ("cls", "cls"),
        ("embedding/bias", "bias"),
    ):
        np.savez(tmp_path / "less.npz", **{key: value for key, value in arrays.items() if key != name})
        with pytest.raises(WeightsError, match=lacking):
            create_backbone(case.name, weights=tmp_path / "less.npz", kwargs=case.kwargs)
    with pytest.raises(WeightsError, match="it has 2 blocks, the model 1"):
        create_backbone(case.name, weights=tmp_path / "w.npz", kwargs=case.kwargs | {"depth": 1})
    with pytest.raises(WeightsError, match="16x16 pixels, the model of 32x32"):
        create_backbone("vit_small_patch32_224", weights=tmp_path / "w.npz", kwargs=case.kwargs)
    with pytest.raises(WeightsError, match="and not for ConvNeXt"):
        create_backbone("convnext_tiny", weights=tmp_path / "w.npz")
    (tmp_path / "w.npz").write_bytes(b"<html>")
    with pytest.raises(WeightsError, match="timm cannot read it as weights of VisionTransformer"):
        create_backbone(case.name, weights=tmp_path / "w.npz", kwargs=case.kwargs)
    with pytest.raises(FileNotFoundError):
        create_backbone(case.name, weights=tmp_path / "none.npz", kwargs=case.kwargs)


def test_a_model_has_the_constants_that_its_published_weights_were_trained_with(tmp_path: Path) -> None:
    save_file(trained("fbnetc_100", {}), tmp_path / "w.safetensors")
    found = create_backbone("fbnetc_100", weights=tmp_path / "w.safetensors")
    assert found.model.bn1.eps == 1e-3  # TensorFlow's; timm's is 1e-5 for random weights.

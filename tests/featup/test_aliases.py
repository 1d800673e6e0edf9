"""Other libraries' names of backbones."""

import re

import pytest

from featup._timm import timm
from featup.aliases import BACKBONE_ALIASES, REFUSED_NAMES, resolve_backbone
from featup.backbones import create_backbone
from featup.errors import GeometryError
from tests.featup.support import run_python


def test_every_alias_names_published_weights_of_timm_and_hides_no_name_of_timms() -> None:
    published = set(timm.list_pretrained())
    assert [name for name in BACKBONE_ALIASES.values() if name not in published] == []
    names = [*BACKBONE_ALIASES, *REFUSED_NAMES]
    assert [name for name in names if timm.is_model(name) or timm.is_model(name.lower())] == []
    assert len({name.lower() for name in names}) == len(names)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("dino16", "vit_small_patch16_224.dino"),
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
        ("facebook/dinov2-with-registers-base", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("dinov3_vits16", "vit_small_patch16_dinov3.lvd1689m"),
        ("vit-b/16", "vit_base_patch16_clip_quickgelu_224.openai"),
        ("hf-hub:google/siglip2-base-patch16-224", "vit_base_patch16_siglip_224.v2_webli"),
        ("mae_vit_base_patch16", "vit_base_patch16_224.mae"),
        ("timm/vit_small_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("hf_hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("vit_small_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("no such name", "no such name"),
    ],
)
def test_names_are_resolved_in_any_case(alias: str, name: str) -> None:
    assert resolve_backbone(alias) == name
    assert resolve_backbone(name) == name


def test_a_backbone_has_timms_name() -> None:
    backbone = create_backbone("DINO_vits16")
    assert backbone.name == "vit_small_patch16_224.dino"
    assert backbone.channels == 384


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(GeometryError, match=r"no model 'dinov2_vits15'; the nearest names are dinov2_vits14"):
        create_backbone("dinov2_vits15")
    with pytest.raises(GeometryError, match=r"no model 'ViT-B/15'; the nearest names are ViT-B/16"):
        create_backbone("ViT-B/15")
    with pytest.raises(GeometryError, match=r"no model 'qqqqqq'; featup.list_backbones\(\) lists all names"):
        create_backbone("qqqqqq")
    with pytest.raises(GeometryError, match=r"'MaskCLIP' names no single timm model: .* give 'ViT-B/16'"):
        create_backbone("MaskCLIP")
    with pytest.raises(GeometryError, match=r"'dinov3' names no single timm model: .*'dinov3_vits16'"):
        create_backbone("dinov3")


def test_what_is_recommended_in_place_of_a_refused_name_is_there() -> None:
    for advice in REFUSED_NAMES.values():
        for name in re.findall(r"'([^']*[-_/][^']*)'", advice):
            assert timm.is_model(resolve_backbone(name)), name


def test_the_table_loads_nothing_heavy() -> None:
    code = "import sys, featup.aliases\nprint([name for name in ('torch', 'timm') if name in sys.modules])"
    assert run_python(code) == "[]\n"

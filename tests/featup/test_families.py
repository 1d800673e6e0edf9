"""Models of every family, small, with random weights: each gives maps at two sizes, or says what to give instead."""

from typing import Any

import pytest

from featup.backbones import create_backbone
from featup.errors import GeometryError
from tests.featup.support import images

# Families without a small variant are made small.
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}

# name, arguments, whether the model is created for each size.
FAMILIES: list[tuple[str, dict[str, Any], bool]] = [
    ("vit_small_patch16_dinov3", {"kwargs": {**VIT, "num_heads": 4, "embed_dim": 64}}, False),
    ("vit_base_patch16_siglip_224", {"kwargs": VIT}, False),
    ("deit3_small_patch16_224", {"kwargs": VIT}, False),
    ("naflexvit_base_patch16_gap", {"kwargs": VIT}, False),
    ("eva02_tiny_patch14_224", {"kwargs": {"depth": 2}}, False),
    ("beit_base_patch16_224", {"kwargs": VIT}, True),
    ("samvit_base_patch16", {"kwargs": VIT, "norm": "none"}, True),
    ("hiera_tiny_224", {}, True),
    ("swin_tiny_patch4_window7_224", {"kwargs": {"depths": (1, 1, 1, 1), "embed_dim": 24}}, False),
    ("maxvit_rmlp_pico_rw_256", {}, True),
    ("tiny_vit_5m_224", {}, False),
    ("pvt_v2_b0", {}, False),
    ("fastvit_t8", {}, False),
    ("caformer_s18", {}, False),
    ("poolformer_s12", {}, False),
    ("mobilevit_xxs", {}, False),
    ("mobilenetv4_conv_small_035", {}, False),
    ("efficientnet_b0", {}, False),
    ("regnetx_002", {}, False),
    ("resnet10t", {}, False),
    ("resnet50_clip", {"layer": 3}, True),
    ("convnext_atto", {}, False),
]


@pytest.mark.parametrize(("name", "arguments", "fixed"), FAMILIES, ids=[name for name, _, _ in FAMILIES])
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning", "ignore:Using a non-tuple sequence:UserWarning")
def test_a_square_and_another_size(name: str, arguments: dict[str, Any], fixed: bool) -> None:
    square = create_backbone(name, image_size=(224, 224), **arguments)
    assert (square.fixed_size is not None) == fixed
    step = square.stride[0]
    size = (5 * step, 7 * step)
    other = create_backbone(name, image_size=size, **arguments) if fixed else square
    for backbone, (height, width) in ((square, (224, 224)), (other, size)):
        features = backbone(images(height, width))
        assert features.shape == (1, height // step, width // step, backbone.channels)
        assert features.isfinite().all()
        assert features.std() > 0


def test_a_model_of_even_grids_refuses_others_with_the_nearest() -> None:
    backbone = create_backbone("mobilevitv2_050", layer=3)
    assert backbone(images(224, 224)).shape == (1, 14, 14, 192)
    with pytest.raises(GeometryError, match=r"map of .* for images of 80x112, .* an even one, such as 64x128"):
        backbone(images(80, 112))
    assert backbone(images(64, 128)).shape == (1, 4, 8, 192)


@pytest.mark.parametrize(
    ("name", "arguments", "text", "cure"),
    [
        (
            "samvit_base_patch16",
            {"kwargs": VIT, "image_size": (64, 96)},
            r"gives a map of \[1, 256, 4, 6\] .* Likely cause: its own final norm, .* give norm='none'",
            {"norm": "none"},
        ),
        ("mobilevitv2_050", {}, r"layer 4, gives a map of .* give layer=3, or another that fits: 0 ", {"layer": 3}),
        ("levit_128s", {}, r"224x224 .* 192x192 or 256x256, or give layer=1 \(stride 32\)", {"layer": 1}),
        ("levit_128s", {}, "192x192 or 256x256", {"image_size": (256, 256)}),
        (
            "eva02_tiny_patch14_224",
            {"image_size": (160, 224), "kwargs": {"depth": 2}},
            r"do not fit the stride 14x14 .* to 154x224 or 168x224",
            {"image_size": (168, 224)},
        ),
        (
            "convit_tiny",
            {"image_size": (160, 224)},
            "convit_tiny fails on images of 160x224 .* give another image_size, such as 224x224",
            {"image_size": (224, 224)},
        ),
    ],
    ids=["samvit", "mobilevitv2", "levit-layer", "levit-size", "eva02", "convit"],
)
def test_a_refusal_says_what_to_give_and_that_works(
    name: str, arguments: dict[str, Any], text: str, cure: dict[str, Any]
) -> None:
    with pytest.raises(GeometryError, match=text):
        create_backbone(name, **arguments)
    create_backbone(name, **{**arguments, **cure})

"""Maps of timm models: sizes, norms, layers and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featup._timm import timm
from featup.backbones import create_backbone
from featup.errors import GeometryError
from tests.featup.support import close, images, normalised

# name, arguments, size, then the stride and channels the paper or timm's documentation of the model gives.
MODELS = [
    ("vit_tiny_patch16_224", {}, (352, 480), 16, 192),
    ("vit_small_patch14_dinov2", {}, (224, 224), 14, 384),
    ("vit_small_patch14_reg4_dinov2", {"layer": 5}, (224, 280), 14, 384),
    ("vit_tiny_patch16_dinov3_qkvb", {}, (224, 224), 16, 192),
    ("vit_tiny_patch16_dinov3_qkvb", {"layer": 0}, (352, 480), 16, 192),
    ("deit_tiny_distilled_patch16_224", {}, (192, 256), 16, 192),
    ("vit_tiny_r_s16_p8_224", {}, (224, 224), 32, 192),
    ("swin_tiny_patch4_window7_224", {}, (224, 224), 32, 768),
    ("swin_tiny_patch4_window7_224", {"stride": 8}, (352, 480), 8, 192),
    ("convnext_atto", {}, (352, 480), 32, 320),
    ("resnet18", {"layer": 2}, (352, 480), 8, 128),
    ("mobilenetv1_100", {"stride": 16, "kwargs": {"pad_type": "same"}}, (224, 224), 16, 512),
    ("mobilenetv2_100", {"stride": 4}, (352, 480), 4, 24),
    ("test_vit_relpos", {"image_size": (352, 480)}, (352, 480), 16, 96),
    ("test_coatnet", {}, (160, 160), 32, 128),
]


@pytest.mark.parametrize(
    ("name", "arguments", "size", "stride", "channels"), MODELS, ids=[f"{m[0]}-{m[2][0]}x{m[2][1]}" for m in MODELS]
)
def test_maps_of_every_family(
    name: str, arguments: dict[str, Any], size: tuple[int, int], stride: int, channels: int
) -> None:
    backbone = create_backbone(name, **arguments)
    assert backbone.stride == (stride, stride)
    assert backbone.channels == channels
    assert backbone.grid(size) == (size[0] // stride, size[1] // stride)
    found = backbone(images(*size))
    assert found.shape == (1, *backbone.grid(size), channels)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert found.isfinite().all()
    assert found.std() > 0


def test_last_map_of_a_vit_is_its_normed_patch_tokens() -> None:
    backbone = create_backbone("vit_small_patch14_reg4_dinov2")
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=(224, 280)).eval()
    model.load_state_dict(resampled(backbone.model, model))
    pictures = images(224, 280, batch=2)
    with torch.no_grad():
        tokens = model.forward_features(normalised(pictures, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert tokens.shape == (2, 5 + 16 * 20, 384)
    close(backbone(pictures), tokens[:, 5:].reshape(2, 16, 20, 384), "patch tokens")


def resampled(source: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    """The state of ``source`` with its position embeddings resampled for ``target`` by timm's loader."""
    state: dict[str, Tensor] = timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), target)
    return state


def test_a_swin_of_free_size_equals_one_made_for_that_size() -> None:
    backbone = create_backbone("swin_tiny_patch4_window7_224", norm="none", layer=-2)
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=(224, 256)).eval()
    model.load_state_dict(backbone.model.state_dict())
    pictures = images(224, 256)
    with torch.no_grad():
        x = model.patch_embed(normalised(pictures, backbone.mean, backbone.std))
        expected = model.layers[2](model.layers[1](model.layers[0](x)))
    assert backbone.layer == 2
    close(backbone(pictures), expected, "third stage")


def test_a_cnn_gives_the_maps_of_its_stages_for_sizes_that_are_not_square() -> None:
    backbone = create_backbone("resnet18", stride=8)
    net = backbone.model
    pictures = images(64, 160, batch=2)
    x = net.maxpool(net.act1(net.bn1(net.conv1(normalised(pictures, backbone.mean, backbone.std)))))
    close(backbone(pictures), net.layer2(net.layer1(x)).permute(0, 2, 3, 1), "stage 2")


def test_patches_that_are_not_square() -> None:
    backbone = create_backbone("test_vit", kwargs={"patch_size": (16, 8)})
    assert backbone.stride == (16, 8)
    assert backbone(images(64, 64)).shape == (1, 4, 8, backbone.channels)
    with pytest.raises(GeometryError, match=r"64x60 .* stride 16x8 .* to 64x56 or 64x64"):
        backbone.grid((64, 60))


def test_norms() -> None:
    pictures = images(32, 48)
    maps = {norm: create_backbone("test_vit", norm=norm) for norm in ("none", "model", "layer")}  # type: ignore[arg-type]
    trained = maps["none"].model.norm
    with torch.no_grad():
        for backbone in maps.values():
            # Not the identity, as in a trained model.
            backbone.model.norm.weight.copy_(torch.linspace(0.5, 2, trained.weight.numel()))
            backbone.model.norm.bias.fill_(0.3)
    raw = maps["none"](pictures)
    mean, std = raw.mean(-1, keepdim=True), raw.var(-1, unbiased=False, keepdim=True).add(trained.eps).sqrt()
    normed = (raw - mean) / std * trained.weight + trained.bias
    close(maps["model"](pictures), normed, "the model's own norm")
    standard = maps["layer"](pictures)
    scale = normed.var(-1, unbiased=False, keepdim=True).add(1e-5).sqrt()
    close(standard, (normed - normed.mean(-1, keepdim=True)) / scale, "norm over channels")

    assert maps["model"].final_norm
    assert not maps["none"].final_norm
    earlier = create_backbone("test_vit", layer=2)
    assert not earlier.final_norm
    close(earlier(pictures), create_backbone("test_vit", layer=2, norm="none")(pictures), "an earlier layer")
    with pytest.raises(GeometryError, match="norm='batch' is not one of none, model, layer"):
        create_backbone("test_vit", norm="batch")  # type: ignore[arg-type]


def test_a_model_that_cannot_norm_maps_gives_them_as_they_are() -> None:
    backbone = create_backbone("hiera_tiny_224")
    assert not backbone.final_norm
    assert backbone.fixed_size == (224, 224)


def test_layers_and_strides_that_are_not_there_are_answered_with_those_that_are() -> None:
    with pytest.raises(GeometryError, match=r"no layer 12; its layers are 0-11 \(stride 16, 192 channels\)"):
        create_backbone("vit_tiny_patch16_224", layer=12)
    with pytest.raises(GeometryError, match=r"no layer of stride 14; .*, 4 \(stride 32, 512 channels\)"):
        create_backbone("resnet18", stride=14)
    with pytest.raises(GeometryError, match="both choose a map"):
        create_backbone("resnet18", stride=16, layer=1)
    assert create_backbone("test_vit", stride=16).layer == 5


def test_sizes_that_do_not_fit_are_answered_with_the_nearest_that_do() -> None:
    backbone = create_backbone("test_vit")
    with pytest.raises(GeometryError, match=r"images of 40x64 .*stride 16x16 .* to 32x64 or 48x64"):
        backbone(images(40, 64))
    with pytest.raises(GeometryError, match=r"images of 5x64 .* to 16x64"):
        backbone.grid((5, 64))
    with pytest.raises(GeometryError, match=r"images of 0x64 .* to 16x64"):
        backbone.grid((0, 64))
    with pytest.raises(GeometryError, match=r"images of 100x64 .* to 96x64 or 112x64"):
        create_backbone("test_vit", image_size=(100, 64))


def test_a_model_of_fixed_size_takes_only_that() -> None:
    backbone = create_backbone("test_vit_relpos", image_size=(64, 96))
    assert backbone.fixed_size == backbone.input_size == (64, 96)
    assert backbone(images(64, 96)).shape == (1, 4, 6, backbone.channels)
    with pytest.raises(GeometryError, match=r"created for images of 64x96 .* cannot take 96x64; .*image_size="):
        backbone(images(96, 64))
    assert create_backbone("test_vit_relpos").fixed_size == (160, 160)
    with pytest.raises(GeometryError, match=r"224x224 .* do not fit the stride 64x64"):
        create_backbone("levit_128s")


def test_a_model_off_the_grid_is_refused() -> None:
    with pytest.raises(GeometryError, match=r"inception_v3, layer 4, gives a map of .* no regular grid"):
        create_backbone("inception_v3")


def test_names_and_arguments_that_cannot_be_served() -> None:
    with pytest.raises(GeometryError, match=r"no model 'vit_tiny_patc16_224'; the nearest .* vit_tiny_patch16_224"):
        create_backbone("vit_tiny_patc16_224")
    with pytest.raises(GeometryError, match=r"Invalid pretrained tag \(nonsense\)"):
        create_backbone("test_vit.nonsense")
    with pytest.raises(GeometryError, match="unexpected keyword argument 'pad_type'") as caught:
        create_backbone("test_vit", kwargs={"pad_type": "same"})
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(GeometryError, match=r"kwargs hold img_size \(decided by image_size\)"):
        create_backbone("test_vit", kwargs={"img_size": 64})
    with pytest.raises(GeometryError, match="mean must be 3 numbers"):
        create_backbone("test_vit", mean=(0.5,))
    with pytest.raises(GeometryError, match="std above 0"):
        create_backbone("test_vit", std=(0.5, 0.0, 0.5))


def featup_test_without_maps(**_: Any) -> nn.Module:
    return nn.Conv2d(3, 4, 16, 16)


def test_a_model_without_intermediate_maps_is_refused() -> None:
    timm.models.register_model(featup_test_without_maps)
    with pytest.raises(GeometryError, match=r"\(Conv2d\) has no intermediate maps"):
        create_backbone("featup_test_without_maps")


def test_images_are_normalised_by_the_given_or_the_models_values() -> None:
    pictures = images(32, 48, batch=2)
    default = create_backbone("test_vit")
    cfg = default.model.pretrained_cfg
    assert (default.mean, default.std) == (tuple(cfg["mean"]), tuple(cfg["std"]))
    assert default.input_size == tuple(cfg["input_size"][1:])
    given = create_backbone("test_vit", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    close(given.normalise(pictures), normalised(pictures, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "normalised")
    close(given(pictures), default.features(given.normalise(pictures)), "features of them")
    assert not torch.equal(given(pictures), default(pictures))


def test_other_images_are_refused() -> None:
    backbone = create_backbone("test_vit")
    for wrong in (images(32, 32).float(), images(32, 32)[0], images(32, 32).permute(0, 3, 1, 2)):
        with pytest.raises(GeometryError, match=r"must be uint8 \[B, H, W, 3\]"):
            backbone(wrong)
    with pytest.raises(GeometryError, match=r"must be \[B, 3, H, W\], got \[1, 32, 32, 3\]"):
        backbone.features(images(32, 32).float())


def test_the_backbone_is_frozen_and_gradients_reach_its_input() -> None:
    backbone = create_backbone("test_vit")
    nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    x = backbone.normalise(images(32, 48)).requires_grad_()
    backbone.features(x)[..., 0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().amin(dim=(0, 1)).count_nonzero() > 0.9 * 32 * 48


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_features_do_not_depend_on_batch_mates(name: str) -> None:
    backbone = create_backbone(name)
    pictures = images(64, 96, batch=3)
    close(backbone(pictures)[1:2], backbone(pictures[1:2]), "second image")

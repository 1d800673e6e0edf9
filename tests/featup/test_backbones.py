import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featup._timm import timm
from featup.backbones import create_backbone
from featup.errors import GeometryError, WeightsError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # Small models on a busy machine wait for one another's threads most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(*size: int, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=generator)


def normalised(pictures: Tensor, mean: Any, std: Any) -> Tensor:
    """What the models take, by numpy and in float64."""
    values = (pictures.numpy() / 255.0 - np.array(mean)) / np.array(std)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32))


def close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    off = (found - expected).abs().max() / expected.abs().max()
    assert off < 1e-4, f"{what} are off by {off:.1e} of their largest value"


def run_python(code: str, **env: str) -> str:
    """Run code in a process of its own, where every warning is an error, and give what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_timm_is_imported_after_an_attempt_without_the_operators_and_again() -> None:
    run_python(
        "import contextlib\n"
        "with contextlib.suppress(RuntimeError):\n"
        "    import torchvision\n"
        "from featup._timm import timm\n"
        "import importlib, featup._timm, torchvision, timm as plain\n"
        "importlib.reload(featup._timm)\n"
        "assert plain is timm is featup._timm.timm\n"
        "timm.create_model('test_vit')"
    )


def test_operators_that_exist_are_left_alone() -> None:
    out = run_python(
        "import torch\n"
        "own = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "for name in ('nms', 'qnms'):\n"
        "    own.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "    own.impl(name, lambda dets, scores, iou_threshold: scores + 1, 'CPU')\n"
        "import featup._timm\n"
        "print(torch.ops.torchvision.nms(torch.zeros(1, 4), torch.tensor([41.0]), 0.5).item())"
    )
    assert float(out) == 42


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
    with pytest.raises(GeometryError, match=r"made for images of 64x96 .* cannot take 96x64; .*image_size="):
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
    with pytest.raises(GeometryError, match=r"\(Conv2d\) gives no intermediate maps"):
        create_backbone("featup_test_without_maps")


def test_images_are_normalised_as_the_model_wants_or_as_told() -> None:
    pictures = images(32, 48, batch=2)
    own = create_backbone("test_vit")
    cfg = own.model.pretrained_cfg
    assert (own.mean, own.std) == (tuple(cfg["mean"]), tuple(cfg["std"]))
    assert own.input_size == tuple(cfg["input_size"][1:])
    assert own.interpolation == cfg["interpolation"]
    assert own.crop == cfg["crop_pct"]
    told = create_backbone("test_vit", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    close(told.normalise(pictures), normalised(pictures, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "normalised")
    close(told(pictures), own.features(told.normalise(pictures)), "features of them")
    assert not torch.equal(told(pictures), own(pictures))


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

"""The model for images in memory: sizes, devices, projections, checkpoints and refusals."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import featup
from featup.backbones import create_backbone
from featup.checkpoints import load_upsampler, pca_bytes, upsampler_bytes
from featup.errors import GeometryError, WeightsError
from featup.images import resize_images
from featup.inference import LONGEST_SIDE, Model, _has_maps, load
from featup.multiview.average import MultiView
from featup.multiview.implicit import FAST, Implicit
from featup.projection import PCAFit
from featup.upsamplers import Bilateral, create_trainable
from tests.featup.support import ROOT, images, run_python


def small(name: str = "test_vit", upsampler: Any = "bilinear", **arguments: Any) -> Model:
    return load(name, upsampler, **{"pretrained": False, "device": "cpu", **arguments})


@pytest.fixture(scope="module")
def model() -> Model:
    return small()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(images(60, 90)[0].numpy()).save(path)
    return path


def test_features_are_those_of_the_backbone_and_the_upsampler_at_the_images_own_size() -> None:
    model = small(upsampler="bilateral")
    image = images(64, 96)
    expected = model.upsampler(model.backbone(image), image, (64, 96))
    assert torch.equal(model(image), expected)
    assert torch.equal(model(image[0]), expected[0])
    assert torch.equal(model.coarse(image[0]), model.backbone(image)[0])


def test_one_image_gives_one_map_and_a_batch_a_batch(model: Model, photo: Path) -> None:
    assert model(photo).shape == (60, 90, 64)
    assert model(str(photo)).dtype == torch.float32
    assert model([photo]).shape == (1, 60, 90, 64)
    assert model(images(60, 90, batch=2)).shape == (2, 60, 90, 64)
    assert model.coarse(photo).shape == (4, 6, 64)
    assert model.coarse([photo, photo]).shape == (2, 4, 6, 64)


def test_the_backbone_sees_the_nearest_multiple_of_its_stride(model: Model) -> None:
    image = images(60, 90)
    seen = resize_images(image, (64, 96))
    assert torch.equal(model(image), model.upsampler(model.backbone(seen), image, (60, 90)))
    assert small("vit_tiny_patch16_224", stride=16).coarse(images(5, 40)[0]).shape == (1, 2, 192)


def test_large_images_are_shrunk_with_their_aspect_ratio(model: Model) -> None:
    image = images(300, 2 * LONGEST_SIDE)[0]
    assert model(image).shape == (150, LONGEST_SIDE, 64)
    assert model.coarse(image).shape == (9, 32, 64)
    assert model(image, size=(300, 1024)).shape == (300, 1024, 64)


def test_sizes(model: Model, photo: Path) -> None:
    assert model(photo, size=(40, 50)).shape == (40, 50, 64)
    assert model(photo, size=70).shape == (70, 70, 64)
    assert model(photo, image_size=(64, 32)).shape == (64, 32, 64)
    assert model(photo, size=(60, 90), image_size=128).shape == (60, 90, 64)
    assert model.coarse(photo, image_size=128).shape == (8, 8, 64)
    given = small(image_size=(64, 32))
    assert given.image_size == (64, 32)
    assert given(photo).shape == (64, 32, 64)
    assert given(photo, image_size=48).shape == (48, 48, 64)
    with pytest.raises(GeometryError, match=r"images of 60x60 .* stride 16x16 .* to 48x48 or 64x64"):
        model(photo, image_size=60)
    with pytest.raises(GeometryError, match=r"cannot upsample \(4, 6\) .* to the smaller \(2, 2\)"):
        model(photo, size=2)
    with pytest.raises(GeometryError, match=r"\(height, width\) or one number"):
        model(photo, size=(1, 2, 3))  # type: ignore[arg-type]


def test_a_model_of_one_size_is_given_that_size_and_returns_the_images_own() -> None:
    model = small("test_vit_relpos")
    assert model.coarse(images(60, 90)[0]).shape == (10, 10, model.channels)
    assert model(images(60, 90)[0]).shape == (60, 90, model.channels)
    assert "images of 160x160 only" in repr(model)
    created = small("test_vit_relpos", image_size=(64, 96))
    assert created(images(60, 90)[0]).shape == (64, 96, model.channels)
    with pytest.raises(GeometryError, match=r"created for images of 64x96 .* create it with image_size=\(32, 32\)"):
        created(images(60, 90)[0], image_size=32)


def test_images_of_different_sizes_need_a_size(model: Model) -> None:
    mixed = [images(60, 90)[0], images(40, 30)[0]]
    assert model(mixed, image_size=64).shape == (2, 64, 64, 64)
    assert model(mixed, image_size=64, size=(40, 50)).shape == (2, 40, 50, 64)
    with pytest.raises(GeometryError, match=r"different sizes in one batch: 40x30, 60x90 .* give image_size= \(and"):
        model(mixed)
    with pytest.raises(GeometryError, match="give image_size= to resize"):
        model(mixed, size=64)


def test_an_images_features_do_not_depend_on_its_batch_mates() -> None:
    model = small(upsampler="bilateral")
    batch = images(48, 64, batch=3)
    torch.testing.assert_close(model(batch)[1], model(batch[1]), rtol=1e-4, atol=1e-5)


def test_a_pca_of_these_images_of_a_file_and_of_a_store(model: Model, tmp_path: Path) -> None:
    image = images(64, 96)[0]
    fit = PCAFit(64)
    fit.add(model.coarse(image))
    pca = fit.solve(3)
    expected = pca.project(model(image))
    torch.testing.assert_close(model(image, pca=pca), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(image, pca=3), model(image, pca=pca), rtol=1e-4, atol=1e-5)

    backbone = model.backbone
    path = tmp_path / "plan" / "pca.safetensors"
    path.parent.mkdir()
    path.write_bytes(pca_bytes(pca, backbone=backbone.name, layer=backbone.layer, weights=backbone.digest))
    # Matrix products round by the address of their input.
    for place in (path, str(tmp_path)):
        torch.testing.assert_close(model(image, pca=place), model(image, pca=pca), rtol=1e-4, atol=1e-5)

    other = small(layer=2)
    with pytest.raises(WeightsError, match=r"made for test_vit, layer 5, .* the backbone is test_vit, layer 2"):
        other(image, pca=path)
    with pytest.raises(GeometryError, match="a projection of 64 channels cannot take features of 96"):
        small("test_resnet")(image, pca=pca)
    with pytest.raises(GeometryError, match="PCA: 24 components of 64 channels from 24 vectors"):
        model(image, pca=24)
    with pytest.raises(FileNotFoundError):
        model(image, pca=tmp_path / "none.safetensors")


def test_results_train_other_modules(model: Model) -> None:
    head = torch.nn.Linear(64, 2)
    head(model(images(32, 32)[0])).sum().backward()
    assert head.weight.grad is not None
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in torch.nn.Sequential(model).train()[0].modules())


def test_the_device_is_the_gpu_where_there_is_one_and_can_be_changed() -> None:
    model = load("test_vit", "bilinear", pretrained=False)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert model.to("cpu") is model
    assert model(images(32, 32)[0]).device == model.device == torch.device("cpu")


def test_the_repr_says_what_it_is() -> None:
    assert repr(small()) == (
        "Model(test_vit on cpu\n  backbone: layer 5, stride 16x16, 64 channels, images of any size\n"
        "  upsampler: bilinear\n)"
    )
    assert "images of 64x32" in repr(small(image_size=(64, 32)))


def test_trained_upsamplers_are_loaded_and_held_to_their_backbone(tmp_path: Path) -> None:
    backbone = create_backbone("test_vit")
    provenance = {"name": "test_vit", "layer": backbone.layer, "digest": backbone.digest}
    for name in ("jbu", "carafe"):
        (tmp_path / name).with_suffix(".safetensors").write_bytes(
            upsampler_bytes(create_trainable(name, 64), backbone=provenance)  # type: ignore[arg-type]
        )
    jbu = tmp_path / "jbu.safetensors"
    model = small(upsampler=None, jbu=jbu)
    image = images(32, 48)
    expected = load_upsampler(jbu, "jbu")(backbone(image), image, (32, 48))
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
    assert small(upsampler="jbu", checkpoint=jbu).upsampler.name == "jbu"
    assert small(upsampler="carafe", checkpoint=tmp_path / "carafe.safetensors").upsampler.name == "carafe"
    with pytest.raises(WeightsError, match=r"made for test_vit, layer 5, .* is test_vit, layer 3"):
        small(upsampler=None, jbu=jbu, layer=3)
    with pytest.raises(GeometryError, match="with upsampler='bilinear' and checkpoint=None: jbu= names"):
        small(jbu=jbu)
    with pytest.raises(GeometryError, match="with upsampler='bilinear', which takes none; give upsampler= one of jbu"):
        small(checkpoint=jbu)
    with pytest.raises(GeometryError, match="jbu needs a trained checkpoint"):
        small(upsampler="jbu")
    with pytest.raises(FileNotFoundError):
        small(upsampler=None, jbu=tmp_path / "none.safetensors")


def test_weights_come_from_a_local_file(tmp_path: Path) -> None:
    source = create_backbone("test_vit", seed=5)
    path = tmp_path / "weights.pth"
    torch.save(source.model.state_dict(), path)
    model = load("test_vit", weights=path, device="cpu")
    assert model.backbone.digest == source.digest
    assert model.upsampler.name == "bilateral"


def test_upsamplers_by_name_and_as_modules() -> None:
    assert featup.list_upsamplers()[:6] == ["nearest", "bilinear", "bicubic", "bilateral", "anyup", "jbu"]
    own = Bilateral(sigma_space=2.0)
    assert small(upsampler=own).upsampler is own
    with pytest.raises(GeometryError, match="unknown upsampler 'bilinar'; there are nearest, bilinear"):
        small(upsampler="bilinar")
    assert featup.list_upsamplers()[-2:] == ["multiview", "implicit"]


def test_multiview_and_implicit_work_in_memory() -> None:
    image = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
    model = small(upsampler="multiview", view_base="bilinear", views=3)
    assert isinstance(model.upsampler, MultiView)
    assert (model.upsampler.base.name, model.upsampler.options.views) == ("bilinear", 3)
    found = model(image, size=48, image_size=64)
    assert found.shape == (48, 48, model.channels)
    # The views are of the image that the backbone sees, also where the result is smaller.
    coarse = model.coarse(image, image_size=64)[None]
    assert torch.equal(found, model.upsampler(coarse, image[None], (48, 48))[0])
    implicit = small(upsampler="implicit")
    assert isinstance(implicit.upsampler, Implicit)
    implicit.upsampler.options = replace(FAST, views=4, steps=2)
    assert implicit(image, size=80, image_size=64, pca=4).shape == (80, 80, 4)
    with pytest.raises(GeometryError, match=r"checkpoint=a\.safetensors with upsampler='multiview'"):
        small(upsampler="multiview", checkpoint="a.safetensors")
    with pytest.raises(GeometryError, match=r"checkpoint=a\.safetensors with upsampler='implicit'"):
        small(upsampler="implicit", checkpoint="a.safetensors")


def featup_test_registered(**_: Any) -> torch.nn.Module:
    return torch.nn.Conv2d(3, 4, 16, 16)


def test_backbones_are_listed_by_pattern() -> None:
    from featup._timm import timm

    every = featup.list_backbones()
    assert len(every) == len(set(every)) > 1000
    assert featup.list_backbones("DINOv2_vits")[:2] == ["dinov2_vits14", "dinov2_vits14_reg"]
    assert featup.list_backbones("vit_small_patch14_*") == ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"]
    assert "vit_small_patch14_dinov2.lvd142m" in featup.list_backbones("patch14", pretrained=True)
    assert featup.list_backbones("no such name") == []
    # A few of either kind of module, those that define their classes and those that import them.
    for name in ("resnet18", "test_convnext", "vit_tiny_r_s16_p8_224", "mobilevit_xxs", "vitamin_small_224"):
        with torch.device("meta"):
            assert hasattr(timm.create_model(name), "forward_intermediates") == (name in every), name
    assert not _has_maps("timm.models._registry")


def test_models_that_the_user_registered_are_listed() -> None:
    from featup._timm import timm

    timm.models.register_model(featup_test_registered)
    assert featup.list_backbones("featup_test_registered") == ["featup_test_registered"]


def test_torch_hub_offers_the_same() -> None:
    code = (
        "import torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'load', 'test_vit', upsampler='bilinear', pretrained=False, "
        "source='local')\n"
        "print(type(model).__name__, *model(torch.zeros(32, 48, 3, dtype=torch.uint8)).shape)"
    )
    assert run_python(code) == "Model 32 48 64\n"


def test_the_readmes_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text().split("## In Python\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    Image.fromarray(images(60, 90)[0].numpy()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    # The tests have no network: random weights of a small model instead.
    assert code.count('"dinov2_vits14"') == 1
    names: dict[str, Any] = {}
    exec(code.replace('"dinov2_vits14"', '"test_vit", pretrained=False'), names)
    assert names["features"].shape == (60, 90, 64)
    assert names["coarse"].shape == (4, 6, 64)
    assert names["components"].shape == (224, 320, 3)

from pathlib import Path

import pytest
import torch
from torch import Tensor

from featup.backbones import create_backbone
from featup.errors import GeometryError
from featup.evaluation.cam import class_probabilities, explain, grad_cam


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def test_probabilities_are_those_of_the_model() -> None:
    backbone = create_backbone("test_vit", image_size=(32, 48))
    images = pictures(2, (32, 48))
    found = class_probabilities(backbone, images)
    assert torch.allclose(found, backbone.model(backbone.normalise(images)).softmax(-1))
    assert torch.allclose(found.sum(1), torch.ones(2))


def test_a_model_without_a_classifier_is_refused() -> None:
    backbone = create_backbone("test_vit", image_size=(32, 32), kwargs={"num_classes": 0})
    with pytest.raises(GeometryError, match="has no classifier"):
        class_probabilities(backbone, pictures(1, (32, 32)))


@pytest.mark.parametrize("norm", ["model", "none"])
def test_of_a_cnn_with_mean_pooling_the_weights_are_the_classifiers(norm: str) -> None:
    """Grad-CAM of the last map of such a model is the original CAM: the class's row of the classifier, over h * w."""
    backbone = create_backbone("test_resnet", image_size=(64, 96), norm=norm)
    images, classes = pictures(2, (64, 96)), torch.tensor([7, 300])
    maps = grad_cam(backbone, images, classes)
    height, width = backbone.grid((64, 96))
    for one, number in zip(maps, classes, strict=True):
        expected = backbone.model.get_classifier().weight[number] / (height * width)
        assert torch.allclose(one.weight[0], expected, atol=1e-6)
        assert one.bias.tolist() == [0.0]


def test_of_an_earlier_map_the_weights_predict_what_a_small_step_does() -> None:
    """The score's slope along a channel that changes everywhere alike, by differences, for features as they are."""
    backbone = create_backbone("test_resnet", image_size=(64, 64), layer=1, norm="none", seed=3)
    image, number, channel, step = pictures(1, (64, 64)), 11, 5, 1e-2
    (found,) = grad_cam(backbone, image, torch.tensor([number]))
    height, width = backbone.grid((64, 64))
    scores = []
    for sign in (-1, 1):
        name = backbone.model.feature_info[1]["module"]

        def add(_: object, __: object, output: Tensor, sign: int = sign) -> Tensor:
            shift = torch.zeros_like(output)
            shift[:, channel] = sign * step
            return output + shift

        handle = backbone.model.get_submodule(name).register_forward_hook(add)
        with torch.no_grad():
            scores.append(float(backbone.model(backbone.normalise(image))[0, number]))
        handle.remove()
    slope = (scores[1] - scores[0]) / (2 * step)
    assert float(found.weight[0, channel]) * height * width == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_layer_normalised_features_get_the_gradient_at_their_own_scale() -> None:
    image, number = pictures(1, (64, 64)), torch.tensor([3])
    plain = create_backbone("test_resnet", image_size=(64, 64), norm="none")
    layer = create_backbone("test_resnet", image_size=(64, 64), norm="layer")
    (raw,), (normalised,) = grad_cam(plain, image, number), grad_cam(layer, image, number)
    # The last map's gradient is the same everywhere, so what is left of the scales is their mean.
    scale = plain(image).std(-1, correction=0).mean()
    assert torch.allclose(normalised.weight, raw.weight * scale, rtol=1e-4)


def test_of_a_vit_with_a_class_token_the_weights_are_the_classifiers() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", image_size=(32, 48))
    (found,) = grad_cam(backbone, pictures(1, (32, 48)), torch.tensor([5]))
    row = backbone.model.head.weight[5] / (2 * 3)
    assert torch.allclose(found.weight[0], row, atol=1e-7)


def test_a_map_timm_only_copies_is_refused() -> None:
    backbone = create_backbone("test_vit", image_size=(32, 32), layer=2)
    with pytest.raises(GeometryError, match=r"test_vit, layer 2.*choose the last layer"):
        grad_cam(backbone, pictures(1, (32, 32)), torch.tensor([0]))


def test_an_image_is_shown_where_its_map_is_high() -> None:
    images = torch.full((2, 1, 4, 3), 200, dtype=torch.uint8)
    shown = explain(images, torch.tensor([[[-1.0, 0.0, 1.0, 2.0]], [[3.0, 3.0, 3.0, 3.0]]]))
    assert shown.dtype == torch.uint8
    assert shown[0, 0, :, 0].tolist() == [0, 0, 100, 200]
    assert shown[1].max() == 0


def test_a_trained_vit_keeps_more_of_its_class_by_the_map_than_by_its_opposite(shared: Path) -> None:
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    weights = shared / "weights" / "vit_tiny_patch16_224.codr_fp16.safetensors"
    backbone = create_backbone("vit_tiny_patch16_224", weights=weights, norm="layer", mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = []
    with tarfile.open(sorted((shared / "data" / "imagenet_sample").glob("*.tar"))[0]) as tar:
        for member in tar:
            if member.name.endswith(".jpg") and len(pixels) < 8:
                file = tar.extractfile(member)
                assert file is not None
                pixels.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB").resize((224, 224))))
    images = torch.from_numpy(np.stack(pixels))
    scores, classes = class_probabilities(backbone, images).max(1)
    features = backbone(images)
    weights_of = torch.cat([one.weight for one in grad_cam(backbone, images, classes)])
    coarse = torch.einsum("bhwc,bc->bhw", features, weights_of)
    full = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    kept, lost = (
        class_probabilities(backbone, explain(images, one)).gather(1, classes[:, None]).mean() for one in (full, -full)
    )
    assert kept > 2 * lost
    assert scores.mean() > kept

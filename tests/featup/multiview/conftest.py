"""A small backbone, images and their features, for the upsamplers that look at views."""

import pytest
import torch
from torch import Tensor

from featup.backbones import Backbone, create_backbone
from tests.featup.multiview.photographs import SIZE


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return create_backbone("test_vit", pretrained=False, stride=16, norm="layer", image_size=SIZE)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Blocks of colour that do not lie on the backbone's grid, each with a texture of its own."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(3, 3, 7, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="nearest")
    noise = torch.rand(3, 3, *SIZE, generator=generator) * 0.1
    return ((smooth * 0.9 + noise) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def features(backbone: Backbone, images: Tensor) -> Tensor:
    with torch.no_grad():
        coarse: Tensor = backbone(images)
    return coarse

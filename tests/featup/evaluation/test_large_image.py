"""Strided and large-image inference, on a backbone whose features are known."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.evaluation.large_image import large_image_features, strided_features
from tests.featup.support import TOLERANCE, picture, relative_error


class Averages(nn.Module):
    """A patch embedding whose answers are known: each patch's mean colour."""

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward_intermediates(self, images: Tensor, **_: Any) -> list[Tensor]:
        return [functional.avg_pool2d(images, self.stride)]


def averages(stride: tuple[int, int], fixed: tuple[int, int] | None = None) -> Backbone:
    return Backbone(
        Averages(stride),
        name="averages",
        layer=0,
        stride=stride,
        channels=3,
        norm="none",
        final_norm=False,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        input_size=fixed or (224, 224),
        fixed=fixed is not None,
        digest="",
    )


def ramp(height: int, width: int) -> Tensor:
    """uint8 ``[1, H, W, 3]``: the row, the column, and their sum."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, y + x], -1)[None].byte()


def ramp_at_cells(backbone: Backbone, size: Sequence[int], factor: int) -> Tensor:
    """What the ramp is at the centres of cells ``factor`` times finer than the backbone's."""
    steps = [step / factor for step in backbone.stride]
    y, x = ((torch.arange(round(side / step)) + 0.5) * step - 0.5 for side, step in zip(size, steps, strict=True))
    y, x = torch.meshgrid(y, x, indexing="ij")
    value = torch.stack([y, x, y + x], -1)[None] / 255
    return (value - torch.tensor(backbone.mean)) / torch.tensor(backbone.std)


@pytest.mark.parametrize(
    ("stride", "factor"),
    [((16, 16), 2), ((16, 16), 4), ((14, 14), 2), ((8, 16), 3), ((4, 4), 1)],
    ids=["whole-pixels", "factor4", "half-pixels", "thirds", "factor1"],
)
def test_strided_features_lie_where_their_cells_are(stride: tuple[int, int], factor: int) -> None:
    backbone, size = averages(stride), (5 * stride[0], 6 * stride[1])
    result = strided_features(backbone, ramp(*size), factor)
    assert result.shape == (1, 5 * factor, 6 * factor, 3)
    within = (slice(None), slice(factor, -factor), slice(factor, -factor))
    expected = ramp_at_cells(backbone, size, factor)
    assert float((result - expected)[within].abs().max()) <= 1e-5


def test_strided_features_reflect_at_the_border() -> None:
    backbone, image = averages((4, 4)), picture(2, 12, 16, 3)
    padded = functional.pad(backbone.normalise(image), (1, 1, 1, 1), mode="reflect")
    result = strided_features(backbone, image, 2)
    for i, j in product(range(2), range(2)):
        shifted = padded[:, :, 2 * i : 2 * i + 12, 2 * j : 2 * j + 16]
        assert relative_error(result[:, i::2, j::2], backbone.features(shifted)) <= TOLERANCE


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_large_image_features_lie_where_their_cells_are(factor: int) -> None:
    backbone, size = averages((8, 16)), (40, 96)
    result = large_image_features(backbone, ramp(*size), factor)
    assert result.shape == (1, 5 * factor, 6 * factor, 3)
    within = (slice(None), slice(factor, -factor), slice(factor, -factor))
    # Half a grey level, from rounding the resized image.
    limit = 0.5 / 255 / min(backbone.std) + 1e-5
    assert float((result - ramp_at_cells(backbone, size, factor))[within].abs().max()) <= limit


def test_large_images_stay_within_black_and_white() -> None:
    """Bicubic overshoots at an edge, and beyond white a byte would begin again at black."""
    backbone, image = averages((1, 1)), torch.zeros(1, 6, 8, 3, dtype=torch.uint8)
    image[:, :, 4:] = 255
    result = large_image_features(backbone, image, 2) * torch.tensor(backbone.std) + torch.tensor(backbone.mean)
    columns = result[0, 5, :, 0]
    assert all(left <= right + TOLERANCE for left, right in pairwise(columns.tolist()))


def test_finer_features_that_cannot_be_had() -> None:
    image = picture(1, 16, 16, 3)
    with pytest.raises(GeometryError, match=r"factor=0: .* from 1 to 4, the stride in pixels"):
        strided_features(averages((4, 8)), image, 0)
    with pytest.raises(GeometryError, match=r"factor=5: .* from 1 to 4"):
        strided_features(averages((4, 8)), image, 5)
    with pytest.raises(GeometryError, match=r"factor=0: .* at least 1"):
        large_image_features(averages((4, 8)), image, 0)
    for finer in (large_image_features, strided_features):
        with pytest.raises(GeometryError, match=r"images must be uint8 \[B, H, W, 3\], got torch.float32"):
            finer(averages((4, 8)), image / 255, 2)
    with pytest.raises(GeometryError, match=r"averages was created for images of 16x16 .* cannot take 32x32"):
        large_image_features(averages((4, 4), fixed=(16, 16)), image, 2)

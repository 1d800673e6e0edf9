"""The crop objective: which cells are compared, what the seed decides, and that it can be learned."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.backbones import Backbone, create_backbone
from featup.errors import GeometryError
from featup.training.crops import CropObjective
from featup.training.objective import seeded
from featup.upsamplers import Interpolate, create_trainable

SIZE = (64, 96)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """test_vit: stride 16, 64 channels, random weights that the name decides."""
    return create_backbone("test_vit", stride=16, image_size=SIZE)


def photographs(count: int = 2, detail: int = 2) -> Tensor:
    """Smooth blobs, uint8 [B, H, W, 3], of ``detail`` times the size."""
    noise = torch.rand(count, 3, 9, 12, generator=torch.Generator().manual_seed(3))
    size = [detail * side for side in SIZE]
    smooth = functional.interpolate(noise, size, mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_what_is_compared(backbone: Backbone) -> None:
    """Against the definition, of one image and one crop at a time, by its own arithmetic."""
    objective = CropObjective(Interpolate("bilinear"), crops=2, projections=None)
    images = photographs()
    errors, distances = [], []
    for place, image in enumerate(images):
        whole = image.view(64, 2, 96, 2, 3).float().mean((1, 3)).round().to(torch.uint8)
        generator = seeded(5, 5, 1, place)
        height = 5 + int(torch.randint(8 - 4, (), generator=generator))
        width = round(6 * height / 4)
        planes = backbone(whole[None]).permute(0, 3, 1, 2)
        upsampled = functional.interpolate(planes, (height, width), mode="bilinear").permute(0, 2, 3, 1)[0]
        for _ in range(2):
            top = int(torch.randint(height - 4 + 1, (), generator=generator))
            left = int(torch.randint(width - 6 + 1, (), generator=generator))
            predicted = upsampled[top : top + 4, left : left + 6]
            rows = slice(round(top * 128 / height), round((top + 4) * 128 / height))
            columns = slice(round(left * 192 / width), round((left + 6) * 192 / width))
            crop = image[rows, columns].permute(2, 0, 1)[None].float()
            zoomed = functional.interpolate(crop, SIZE, mode="bilinear", antialias=True)
            target = backbone(zoomed.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))[0]
            errors.append((predicted - target).square().mean())
            distances.append(1 - functional.cosine_similarity(predicted, target, dim=-1).mean())
    found = objective(backbone, images, seed=5, step=1)
    torch.testing.assert_close(found["reconstruction"], torch.stack(errors).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found["cosine"], torch.stack(distances).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found["loss"], found["reconstruction"] + found["cosine"])


def test_exact_features_are_exact(backbone: Backbone) -> None:
    """Of a plain image, each crop is the image itself; only the borders of what the backbone sees could differ."""
    grey = torch.full((1, 128, 192, 3), 90, dtype=torch.uint8)
    mean = backbone(grey[:, :64, :96]).mean((1, 2), keepdim=True)

    class Plain(torch.nn.Module):
        """A backbone without positions: the same feature everywhere."""

        channels, grid, normalise = backbone.channels, staticmethod(backbone.grid), staticmethod(backbone.normalise)

        def features(self, normalised: Tensor) -> Tensor:
            return mean.expand(len(normalised), 4, 6, -1)

    found = CropObjective(Interpolate("nearest")).evaluate(Plain(), [grey], 5)  # type: ignore[arg-type]
    assert found.loss == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["jbu", "resize_conv", "carafe", "sapa", "ifa", "anyup"])
def test_gradients_reach_every_weight(backbone: Backbone, name: str) -> None:
    """All stages of a stack too, though the targets are at most twice as fine as the coarse map."""
    torch.manual_seed(0)
    upsampler = create_trainable(name, backbone.channels, stages=4, width=16)  # type: ignore[arg-type]
    objective = CropObjective(upsampler, crops=1, projections=12)
    optimiser = torch.optim.SGD(objective.parameters(), lr=1e-2)
    for step in (1, 2):
        optimiser.zero_grad()
        objective(backbone, photographs(1), seed=5, step=step)["loss"].backward()
        optimiser.step()
    without = {name for name, one in objective.named_parameters() if one.grad is None or not one.grad.abs().sum()}
    unused = {f"upsampler.cross_decode.cross_attn.attention.out_proj.{leaf}" for leaf in ("weight", "bias")}
    assert without <= unused, without


def test_the_loss_follows_from_seed_and_step(backbone: Backbone) -> None:
    objective, images = CropObjective(Interpolate("bilinear"), projections=8), photographs(4)

    def loss(seed: int = 5, step: int = 1) -> Tensor:
        return objective(backbone, images, seed=seed, step=step)["loss"]

    first = loss()
    torch.rand(3)
    assert torch.equal(loss(), first)
    assert not torch.equal(loss(step=2), first)
    assert not torch.equal(loss(seed=6), first)
    shares = [objective(backbone, images[at : at + 2], seed=5, step=1, first=at)["loss"] for at in (0, 2)]
    torch.testing.assert_close((shares[0] + shares[1]) / 2, first, rtol=1e-5, atol=0)


def test_evaluation_does_not_depend_on_the_batches(backbone: Backbone) -> None:
    objective, images = CropObjective(Interpolate("bilinear"), projections=8), photographs(3)
    whole = objective.evaluate(backbone, [images], 5)
    assert tuple(whole) == pytest.approx(tuple(objective.evaluate(backbone, images.split(1), 5)), rel=1e-5)
    assert whole == objective.evaluate(backbone, [images], 5)
    assert whole.explained_variance < 1


def test_training_lowers_the_held_out_loss(backbone: Backbone) -> None:
    torch.manual_seed(0)
    objective = CropObjective(create_trainable("anyup", backbone.channels, width=16), projections=None)
    optimiser = torch.optim.NAdam(objective.parameters(), lr=3e-3)
    before = objective.evaluate(backbone, [photographs()], 5)
    for step in range(1, 21):
        optimiser.zero_grad()
        objective(backbone, photographs(), seed=5, step=step)["loss"].backward()
        optimiser.step()
    assert objective.evaluate(backbone, [photographs()], 5).loss < before.loss


@pytest.mark.parametrize("options", [{"crops": 0}, {"least": 0.0}, {"least": 1.0}, {"detail": 0}, {"projections": 0}])
def test_numbers_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(GeometryError, match=r"objective: .*must be at least 1"):
        CropObjective(Interpolate("bilinear"), **options)  # type: ignore[arg-type]

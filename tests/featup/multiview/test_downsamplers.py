"""Downsamplers against the original's values, and against windows taken out one by one."""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.multiview.downsamplers import AttentionDownsampler, BlurDownsampler, Padding
from tests.featup.support import TOLERANCE, random, relative_error

M = TypeVar("M", bound=torch.nn.Module)

CHANNELS = 5

# kernel, stride, grid; all (height, width)
GEOMETRIES = {
    "patches": ((4, 3), (4, 3), (3, 5)),
    "overlapping": ((7, 6), (4, 3), (3, 4)),
    "apart": ((2, 3), (5, 4), (3, 2)),
    "across-only": ((3, 7), (3, 4), (5, 3)),
    "one-cell": ((7, 8), (4, 5), (1, 1)),
}
every_geometry = pytest.mark.parametrize(("kernel", "stride", "grid"), GEOMETRIES.values(), ids=GEOMETRIES.keys())
every_padding = pytest.mark.parametrize("padding", ["reflect", "valid"])


def shuffled(module: M) -> M:
    """With parameters that all matter, some of them negative."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def map_size(
    kernel: tuple[int, int], stride: tuple[int, int], grid: tuple[int, int], padding: Padding
) -> tuple[int, int]:
    if padding == "reflect":
        return grid[0] * stride[0], grid[1] * stride[1]
    # One more than the windows need, which is not read.
    return (grid[0] - 1) * stride[0] + kernel[0] + 1, (grid[1] - 1) * stride[1] + kernel[1] + 1


def smoothed(values: Tensor) -> Tensor:
    """A 5 x 5 Gaussian of sigma 1 over a reflected border."""
    taps = torch.exp(-(torch.arange(-2.0, 3.0, dtype=values.dtype) ** 2) / 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    planes = functional.pad(values.permute(0, 3, 1, 2), [2] * 4, mode="reflect")
    weight = kernel.expand(values.shape[-1], 1, 5, 5)
    return functional.conv2d(planes, weight, groups=values.shape[-1]).permute(0, 2, 3, 1)


def windows(
    values: Tensor, kernel: tuple[int, int], stride: tuple[int, int], grid: tuple[int, int], padding: Padding
) -> Tensor:
    """``[B, H, W, C]`` to ``[B, h, w, C, K, L]``: each cell's window, by padding and unfolding."""
    planes = values.permute(0, 3, 1, 2)
    if padding == "reflect":
        # F.pad takes (left, right, top, bottom), and crops where a number is negative.
        around = []
        for k, s in ((kernel[1], stride[1]), (kernel[0], stride[0])):
            before = -((s - k) // 2)
            around += [before, k - s - before]
        positive = [max(0, a) for a in around]
        planes = functional.pad(planes, positive, mode="reflect")
        planes = functional.pad(planes, [min(0, a) for a in around])
    found = planes.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    return found[:, :, : grid[0], : grid[1]].permute(0, 2, 3, 1, 4, 5)


def naive_attention(
    module: AttentionDownsampler, values: Tensor, logits: Tensor, grid: tuple[int, int], padding: Padding
) -> Tensor:
    if module.blur:
        values, logits = smoothed(values), smoothed(logits)
    seen = windows(values, module.kernel, module.stride, grid, padding)
    scores = windows(logits, module.kernel, module.stride, grid, padding) * module.scale + module.bias
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    return (seen * weights).sum((-1, -2))


def golden(shared: Path, prefix: str) -> dict[str, NDArray[Any]]:
    with np.load(shared / "golden" / "featup_reference.npz") as values:
        return {key.removeprefix(f"{prefix}/"): values[key] for key in values if key.startswith(f"{prefix}/")}


def channels_last(planes: NDArray[Any]) -> Tensor:
    return torch.from_numpy(planes).permute(0, 2, 3, 1)


# Against the original


def test_blur_equals_the_original(shared: Path) -> None:
    values = golden(shared, "simple_downsampler")
    source, expected = channels_last(values["input"]), channels_last(values["output"])
    kernel, final = int(values["kernel_size"]), int(values["final_size"])
    stride = source.shape[1] // final
    module = BlurDownsampler((kernel, kernel), (stride, stride), padding="valid")
    module.load_state_dict({"weight": torch.from_numpy(values["state_dict/kernel_params"])})
    with torch.no_grad():
        assert relative_error(module(source, (final, final)), expected) < TOLERANCE


def test_attention_equals_the_original(shared: Path) -> None:
    values = golden(shared, "attention_downsampler")
    source, expected = channels_last(values["input"]), channels_last(values["output"])
    kernel, final = int(values["kernel_size"]), int(values["final_size"])
    stride = source.shape[1] // final
    module = AttentionDownsampler(source.shape[-1], (kernel, kernel), (stride, stride), padding="valid").eval()
    renamed = {
        "scale": "w",
        "bias": "b",
        "attention.weight": "attention_net.1.weight",
        "attention.bias": "attention_net.1.bias",
    }
    module.load_state_dict({ours: torch.from_numpy(values[f"state_dict/{theirs}"]) for ours, theirs in renamed.items()})
    with torch.no_grad():
        found = module(source, module.logit_map(source), (final, final))
    assert relative_error(found, expected) < TOLERANCE


# Against unfolding


@every_geometry
@every_padding
def test_blur_equals_unfolding(
    kernel: tuple[int, int], stride: tuple[int, int], grid: tuple[int, int], padding: Padding
) -> None:
    module = shuffled(BlurDownsampler(kernel, stride, padding))
    values = random(2, *map_size(kernel, stride, grid, padding), CHANNELS).requires_grad_()
    weight = module.weight.abs()
    expected = (windows(values, kernel, stride, grid, padding) * (weight / weight.sum())).sum((-1, -2))
    found = module(values, grid)
    assert_same_with_gradients(found, expected, {"values": values, "weight": module.weight})


@every_geometry
@every_padding
@pytest.mark.parametrize("blur", [True, False], ids=["smoothed", "as-is"])
def test_attention_equals_unfolding(
    kernel: tuple[int, int], stride: tuple[int, int], grid: tuple[int, int], padding: Padding, blur: bool
) -> None:
    module = shuffled(AttentionDownsampler(CHANNELS, kernel, stride, padding=padding, blur=blur)).eval()
    features = random(2, *map_size(kernel, stride, grid, padding), CHANNELS).requires_grad_()
    logits = features @ module.attention.weight.T + module.attention.bias
    expected = naive_attention(module, features, logits, grid, padding)
    found = module(features, module.logit_map(features), grid)
    assert_same_with_gradients(found, expected, {"features": features, **dict(module.named_parameters())})
    with torch.no_grad():
        plain = module(features, module.logit_map(features), grid)
    assert relative_error(plain, expected.detach()) < TOLERANCE, "without gradients"


def assert_same_with_gradients(found: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    assert relative_error(found.detach(), expected.detach()) < TOLERANCE
    weight = random(*expected.shape, seed=9)
    ours = torch.autograd.grad((found * weight).sum(), list(inputs.values()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(inputs.values()))
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        # With one logit bias for a whole window the softmax does not see it: both are zero up to rounding.
        assert float((one - other).abs().max()) < TOLERANCE * max(largest, 1.0), f"gradient of {name}"


def test_gradcheck() -> None:
    blur = shuffled(BlurDownsampler((3, 4), (2, 3)).double())
    attention = shuffled(AttentionDownsampler(2, (3, 4), (2, 3)).double()).eval()
    values = random(1, 4, 6, 2, dtype=torch.float64).requires_grad_()
    logits = random(1, 4, 6, 1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, _: blur(v, (2, 2)), (values, blur.weight))
    assert torch.autograd.gradcheck(
        lambda v, x, *_: attention(v, x, (2, 2)), (values, logits, attention.scale, attention.bias)
    )
    assert torch.autograd.gradcheck(
        lambda v, *_: attention.logit_map(v), (values, attention.attention.weight, attention.attention.bias)
    )


# What training relies on


@pytest.mark.parametrize("name", ["blur", "attention"])
def test_projections_of_the_channels_commute(name: str) -> None:
    kernel, stride, grid = GEOMETRIES["overlapping"]
    features = random(2, *map_size(kernel, stride, grid, "reflect"), CHANNELS)
    projection = random(CHANNELS, 3)
    with torch.no_grad():
        if name == "blur":
            blur = shuffled(BlurDownsampler(kernel, stride))
            whole, few = blur(features, grid), blur(features @ projection, grid)
        else:
            attention = shuffled(AttentionDownsampler(CHANNELS, kernel, stride)).eval()
            first = attention.logit_projection
            logits = features @ first.weight.T + first.bias
            whole = attention(features, attention.logit_map(features), grid)
            few = attention(features @ projection, logits, grid)
    assert relative_error(few, whole @ projection) < TOLERANCE


@every_geometry
@every_padding
def test_a_constant_stays_itself(
    kernel: tuple[int, int], stride: tuple[int, int], grid: tuple[int, int], padding: Padding
) -> None:
    size = map_size(kernel, stride, grid, padding)
    constant = torch.full((1, *size, 2), 3.0)
    with torch.no_grad():
        blurred = shuffled(BlurDownsampler(kernel, stride, padding))(constant, grid)
        attended = AttentionDownsampler(2, kernel, stride, padding=padding)(constant, random(1, *size, 1), grid)
    torch.testing.assert_close(blurred, torch.full((1, *grid, 2), 3.0))
    torch.testing.assert_close(attended, torch.full((1, *grid, 2), 3.0))


def test_a_new_blur_is_the_mean_of_each_patch() -> None:
    values = random(2, 12, 15, CHANNELS)
    with torch.no_grad():
        found = BlurDownsampler((4, 3), (4, 3))(values, (3, 5))
    expected = functional.avg_pool2d(values.permute(0, 3, 1, 2), (4, 3)).permute(0, 2, 3, 1)
    assert relative_error(found, expected) < TOLERANCE


def test_windows_are_centred_on_their_patches() -> None:
    """On a ramp the mean over a window is its centre, which is the patch's, away from the border."""
    rows = torch.arange(20.0).view(1, 20, 1, 1).expand(1, 20, 12, 1)
    with torch.no_grad():
        centred = BlurDownsampler((9, 3), (5, 4))(rows, (4, 3))[0, 1:-1, :, 0]
    torch.testing.assert_close(centred, torch.tensor([7.0, 12.0])[:, None].expand(2, 3))


def test_attention_weights_sum_to_one_and_follow_the_logits() -> None:
    module = AttentionDownsampler(CHANNELS, (4, 3), (4, 3), blur=False).eval()
    logits = torch.zeros(1, 8, 6, 1)
    logits[0, 5, 4] = 50.0
    with torch.no_grad():
        filters = module.filters(logits, (2, 2))
        values = random(1, 8, 6, CHANNELS)
        found = module(values, logits, (2, 2))
    torch.testing.assert_close(filters.sum((-1, -2)), torch.ones(1, 2, 2))
    torch.testing.assert_close(found[0, 1, 1], values[0, 5, 4])
    torch.testing.assert_close(found[0, 0, 0], values[0, :4, :3].mean((0, 1)))


def test_images_do_not_see_their_batch_mates() -> None:
    module = shuffled(AttentionDownsampler(CHANNELS, (7, 6), (4, 3))).eval()
    features = random(3, 12, 12, CHANNELS)
    with torch.no_grad():
        together = module(features, module.logit_map(features), (3, 4))
        alone = module(features[1:2], module.logit_map(features[1:2]), (3, 4))
    torch.testing.assert_close(together[1:2], alone)


def test_dropout_is_for_training_only() -> None:
    features = random(1, 40, 50, CHANNELS)
    module = shuffled(AttentionDownsampler(CHANNELS, (4, 3), (4, 3), dropout=0.5))
    with torch.no_grad():
        exact = features @ module.attention.weight.T + module.attention.bias
        torch.testing.assert_close(module.eval().logit_map(features), exact)
        torch.manual_seed(0)
        module.train()
        drawn = torch.stack([module.logit_map(features) for _ in range(200)])
        assert float((drawn[0] - exact).abs().mean()) > 0.1
        assert relative_error(drawn.mean(0), exact) < 0.15, "the mean over dropout is the logit without"
        undropped = AttentionDownsampler(CHANNELS, (4, 3), (4, 3), dropout=0.0).train()
        undropped.load_state_dict(module.state_dict())
        torch.testing.assert_close(undropped.logit_map(features), exact)


# What is refused


def test_impossible_downsamplers_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"stride=\(4, 0\)"):
        BlurDownsampler((4, 4), (4, 0))
    with pytest.raises(GeometryError, match="'same'"):
        BlurDownsampler((4, 4), (4, 4), padding="same")  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match=r"dropout=1"):
        AttentionDownsampler(3, (4, 4), (4, 4), dropout=1.0)


def test_maps_of_another_size_are_refused() -> None:
    blur = BlurDownsampler((4, 3), (4, 3))
    with pytest.raises(GeometryError, match=r"a map of \(12, 16\) does not give a grid of \(3, 5\)"):
        blur(random(1, 12, 16, 2), (3, 5))
    with pytest.raises(GeometryError, match="'valid' one of at least"):
        BlurDownsampler((7, 7), (5, 5), padding="valid")(random(1, 21, 22, 2), (4, 4))
    with pytest.raises(GeometryError, match="grid of"):
        blur(random(1, 12, 15, 2), (0, 5))
    attention = AttentionDownsampler(2, (4, 3), (4, 3))
    with pytest.raises(GeometryError, match="logit_map computes them"):
        attention(random(1, 12, 15, 2), random(1, 12, 14, 1), (3, 5))

"""AnyUp: against the original's values and a dense oracle, under channel maps, and in memory."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from featup import create_upsampler
from featup.errors import GeometryError, WeightsError
from featup.upsamplers import AnyUp, ChannelMap
from featup.upsamplers.jbu import IMAGENET_MEAN, IMAGENET_STD
from tests.featup.support import TOLERANCE, picture, random, relative_error, run_python

CASES = ["a_square_16x", "b_nonsquare", "c_other_output", "d_larger_grid", "e_smaller_output"]


def random_anyup(width: int = 16, seed: int = 0) -> AnyUp:
    torch.manual_seed(seed)
    anyup = AnyUp(width)
    with torch.no_grad():
        for name, parameter in anyup.named_parameters():
            if name != "rope.freqs":
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        # Sharp attention, so that a wrong cell shows.
        anyup.cross_decode["cross_attn"]["attention"].in_proj_weight.mul_(4)
    return anyup


def dense(anyup: AnyUp, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention of every position to every cell, and a mask; by torch's own modules, NCHW, on whole maps."""
    dtype = anyup.rope.freqs.dtype
    colours = (image.to(dtype) / 255 - torch.tensor(IMAGENET_MEAN, dtype=dtype)) / torch.tensor(
        IMAGENET_STD, dtype=dtype
    )
    encoded = anyup.image_encoder(colours.movedim(-1, 1)).movedim(1, -1)
    at = torch.meshgrid(*(torch.linspace(0, 1, side, dtype=dtype) for side in image.shape[1:3]), indexing="ij")
    angle = torch.stack(at, -1) @ anyup.rope.freqs
    first, second = encoded.chunk(2, -1)
    encoded = (encoded * angle.cos() + torch.cat([-second, first], -1) * angle.sin()).movedim(-1, 1)
    low, coarse = tuple(features.shape[1:3]), features.movedim(-1, 1)
    keys = functional.adaptive_avg_pool2d(anyup.key_encoder(encoded), low)
    _, *blocks = anyup.key_features_encoder
    keys = torch.cat([keys, torch.nn.Sequential(*blocks)(unified(anyup, functional.normalize(coarse)))], 1)
    # Padding by reflection of an axis of one position is not defined; it is repeated.
    for axis, pad in ((2, (0, 0, 1, 1)), (3, (1, 1, 0, 0))):
        keys = functional.pad(keys, pad, mode="reflect" if keys.shape[axis] > 1 else "replicate")
    keys = anyup.aggregation(keys)
    queries = functional.adaptive_avg_pool2d(anyup.query_encoder(encoded), size)
    queries = functional.conv2d(queries, anyup.cross_decode["conv2d"].weight, padding=1)
    attention = anyup.cross_decode["cross_attn"]
    q = attention["norm_q"](queries.flatten(2).mT)
    k = attention["norm_k"](keys.flatten(2).mT)
    inside = [window(high, side) for high, side in zip(size, low, strict=True)]
    mask = (inside[0][:, None, :, None] & inside[1][None, :, None, :]).flatten(0, 1).flatten(1)
    _, weights = attention["attention"](q, k, k, attn_mask=~mask)
    return (weights @ features.flatten(1, 2).to(dtype)).unflatten(1, size)


def unified(anyup: AnyUp, coarse: Tensor) -> Tensor:
    basis = anyup.key_features_encoder[0].basis
    patterns, channels = len(basis), coarse.shape[1]
    padded = functional.pad(coarse, (2, 2, 2, 2))
    responses = functional.conv2d(padded, basis.repeat(channels, 1, 1, 1), groups=channels)
    count = functional.avg_pool2d(functional.pad(torch.ones_like(coarse[:, :1]), (2, 2, 2, 2)), 5, 1) * 25
    return (responses / count).unflatten(1, (patterns, channels)).softmax(1).mean(2)


def window(high: int, low: int) -> Tensor:
    """Which of ``low`` cells each of ``high`` positions attends to, bool; one position after the other."""
    seen = torch.zeros(high, low, dtype=torch.bool)
    for position in range(high):
        centre = (np.float32(position) + np.float32(0.5)) / np.float32(high)
        first = max(np.float32(0), centre - np.float32(0.1)) * np.float32(low)
        stop = min(np.float32(1), centre + np.float32(0.1)) * np.float32(low)
        seen[position, math.floor(first) : math.ceil(stop)] = True
    return seen


@pytest.mark.parametrize(
    ("low", "guide", "size"),
    [
        ((3, 5), (24, 40), (24, 40)),
        ((5, 3), (23, 31), (37, 29)),
        ((11, 13), (44, 39), (31, 43)),
        ((20, 26), (40, 30), (45, 61)),
        ((1, 1), (9, 7), (9, 7)),
        ((1, 6), (8, 36), (8, 36)),
        ((9, 9), (5, 6), (20, 20)),
        ((6, 7), (12, 14), (6, 7)),
    ],
    ids=lambda size: "x".join(map(str, size)),
)
def test_gives_what_dense_attention_gives(low: tuple[int, int], guide: tuple[int, int], size: tuple[int, int]) -> None:
    anyup = random_anyup().double()
    features, image = random(2, *low, 6, dtype=torch.float64), picture(2, *guide, 3)
    expected = dense(anyup, features, image, size).detach()
    with torch.no_grad():
        assert relative_error(anyup(features, image, size), expected) <= 1e-6, "in tiles"
    assert relative_error(anyup(features, image, size).detach(), expected) <= 1e-6, "with gradients"


def test_gradients_are_those_of_dense_attention() -> None:
    anyup = random_anyup().double()
    features, image = random(1, 4, 5, 6, dtype=torch.float64).requires_grad_(), picture(1, 20, 30, 3)
    parameters = {name: p for name, p in anyup.named_parameters() if "out_proj" not in name}
    wanted = random(1, 20, 30, 6, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((result * wanted).sum(), [features, *parameters.values()])
        for result in (anyup(features, image, (20, 30)), dense(anyup, features, image, (20, 30)))
    )
    for name, mine, other in zip(["features", *parameters], ours, theirs, strict=True):
        assert mine.isfinite().all(), name
        assert (mine - other).abs().max() <= 1e-6 * max(1.0, float(other.abs().max())), f"gradient of {name}"


def test_commutes_with_channel_maps() -> None:
    anyup = random_anyup()
    features, image = random(1, 5, 6, 24), picture(1, 40, 48, 3)
    projection = ChannelMap(random(4, 24, seed=1), random(4, seed=2))
    with torch.no_grad():
        before = anyup(features, image, (40, 48), projection)
        after = functional.linear(anyup(features, image, (40, 48)), projection.weight, projection.bias)
    assert relative_error(before, after) <= TOLERANCE


def test_does_not_depend_on_the_batch() -> None:
    anyup = random_anyup().requires_grad_(False)
    features, image = random(3, 5, 6, 8), picture(3, 40, 48, 3)
    together = anyup(features, image, (40, 48))
    for number in range(3):
        alone = anyup(features[number : number + 1], image[number : number + 1], (40, 48))
        assert torch.equal(alone[0], together[number])


def test_a_constant_map_stays_constant() -> None:
    result = random_anyup().requires_grad_(False)(torch.full((1, 4, 5, 3), 2.5), picture(1, 33, 41, 3), (33, 41))
    assert (result - 2.5).abs().max() < 1e-5


def test_half_precision_features() -> None:
    anyup = random_anyup().requires_grad_(False)
    features, image = random(1, 5, 6, 8).half(), picture(1, 40, 48, 3)
    result = anyup(features, image, (40, 48))
    assert result.dtype == torch.float16
    assert relative_error(result, anyup(features.float(), image, (40, 48))) < 1e-3


def test_several_bands_of_rows() -> None:
    """An image whose encoding does not lie in one block of memory gives what whole maps give."""
    anyup = random_anyup(32).double()
    features, image = random(1, 8, 12, 3, dtype=torch.float64), picture(1, 400, 700, 3)
    with torch.no_grad():
        tiled = anyup(features, image, (100, 150))
    assert relative_error(tiled, anyup(features, image, (100, 150)).detach()) <= TOLERANCE


def test_memory_is_the_output_and_a_quarter() -> None:
    """Of 384 channels at 448x448, in a process of its own; in encoding, three maps of 128 channels are as large."""
    printed = run_python(
        "import re, torch\n"
        "from featup.upsamplers import AnyUp\n"
        "torch.set_num_threads(1)\n"
        "torch.set_grad_enabled(False)\n"
        "anyup = AnyUp().requires_grad_(False)\n"
        "def peak(): return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "anyup(torch.randn(1, 4, 4, 384), torch.rand(1, 64, 64, 3), (64, 64))\n"
        "features, image, before = torch.randn(1, 28, 28, 384), torch.rand(1, 448, 448, 3), peak()\n"
        "result = anyup(features, image, (448, 448))\n"
        "print((peak() - before) / result.nbytes)\n"
    )
    assert 1 <= float(printed) <= 1.25, f"{float(printed):.3f} times the output"


@pytest.fixture(scope="session")
def golden(shared: Path) -> Any:
    with np.load(shared / "golden" / "anyup_reference.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def of_golden(golden: Any, case: str, folder: Path) -> tuple[AnyUp, Tensor, Tensor, Tensor]:
    """Our network with the original's weights, through its state dict; and a case, channels-last."""
    weights = {name[8:]: torch.from_numpy(value) for name, value in golden.items() if name.startswith("weights/")}
    torch.save(weights, folder / "official.pth")
    anyup = create_upsampler("anyup", channels=5, checkpoint=folder / "official.pth")
    assert isinstance(anyup, AnyUp)
    maps = [torch.from_numpy(golden[f"{case}/{name}"]).movedim(1, -1) for name in ("features", "image", "upsampled")]
    # The original was given normalised images.
    return anyup, maps[0], maps[1] * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN), maps[2]


@pytest.mark.parametrize("case", CASES)
def test_gives_what_the_original_gave(golden: Any, case: str, tmp_path: Path) -> None:
    anyup, features, guidance, expected = of_golden(golden, case, tmp_path)
    size = (expected.shape[1], expected.shape[2])
    assert relative_error(anyup(features, guidance, size), expected) <= TOLERANCE, "in tiles"
    anyup.requires_grad_(True)
    assert relative_error(anyup(features, guidance, size).detach(), expected) <= TOLERANCE, "with gradients"


def test_gradients_are_those_of_the_original(golden: Any, tmp_path: Path) -> None:
    """Of the mean of the squares of the output."""
    case = "b_nonsquare"
    anyup, features, guidance, expected = of_golden(golden, case, tmp_path)
    anyup.requires_grad_(True)
    features.requires_grad_()
    anyup(features, guidance, (expected.shape[1], expected.shape[2])).square().mean().backward()
    assert features.grad is not None
    wanted = torch.from_numpy(golden[f"{case}/grad_features"]).movedim(1, -1)
    assert relative_error(features.grad, wanted) <= TOLERANCE, "gradient of the features"
    named = {name.removeprefix(f"{case}/grad/"): value for name, value in golden.items() if f"{case}/grad/" in name}
    assert len(named) == 3
    for name, value in named.items():
        gradient = anyup.get_parameter(name).grad
        assert gradient is not None, name
        assert relative_error(gradient, torch.from_numpy(value)) <= TOLERANCE, f"gradient of {name}"


def test_layout_is_the_published_one(golden: Any) -> None:
    layout = json.loads(str(golden["official_layout"]))
    assert {name: list(value.shape) for name, value in AnyUp().state_dict().items()} == layout


def test_checkpoints(tmp_path: Path) -> None:
    anyup = random_anyup()
    state = anyup.state_dict()
    torch.save(state, tmp_path / "official.pth")
    safetensors.torch.save_file(state, tmp_path / "official.safetensors")
    features, image = random(1, 3, 4, 7), picture(1, 12, 16, 3)
    expected = anyup.requires_grad_(False)(features, image, (12, 16))
    for name in ("official.pth", "official.safetensors"):
        loaded = create_upsampler("anyup", channels=7, checkpoint=tmp_path / name)
        assert torch.equal(loaded(features, image, (12, 16)), expected), name
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"no AnyUp in it; .* found \['a'\]"):
        create_upsampler("anyup", channels=7, checkpoint=tmp_path / "other.pth")
    torch.save({name: value for name, value in state.items() if name != "rope.freqs"}, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"missing from it \(1\): rope\.freqs"):
        create_upsampler("anyup", channels=7, checkpoint=tmp_path / "cut.pth")


def test_refuses_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(GeometryError, match=r"width=20 must be a positive multiple of 8"):
        AnyUp(20)

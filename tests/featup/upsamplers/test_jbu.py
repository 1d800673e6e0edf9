"""The paper's JBU, against equations 5 to 7 written a second way and the original's values."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featup.checkpoints import load_jbu
from featup.errors import GeometryError
from featup.upsamplers import JBU
from featup.upsamplers.jbu import JBUStage
from tests.featup.support import CHANNELS, TOLERANCE, picture, random, relative_error
from tests.featup.upsamplers.support import random_jbu


def equations_5_to_7(state: dict[str, Tensor], source: Tensor, guidance: Tensor, radius: int) -> Tensor:
    """One learned stage written from the paper, planes first: ``[B, C, h, w]``, ``[B, 3, H, W]`` to ``[B, C, H, W]``.

    Equation 5 is the weighted sum over the window, 6 the softmax of key products, 7 the Gaussian of the distance.
    """
    batch, _, height, width = guidance.shape
    side = 2 * radius + 1

    def pointwise(planes: Tensor, layer: str) -> Tensor:
        return functional.conv2d(planes, state[f"{layer}.weight"][:, :, None, None], state[f"{layer}.bias"])

    def windows(planes: Tensor) -> Tensor:
        """``[B, D, H, W]`` to ``[B, D, side * side, H, W]``."""
        beyond = functional.pad(planes, (radius,) * 4, mode="reflect")
        return functional.unfold(beyond, side).view(batch, planes.shape[1], side**2, height, width)

    keys = pointwise(functional.gelu(pointwise(guidance, "range_in")), "range_out")
    products = (keys[:, :, None] * windows(keys)).sum(1)
    in_range = torch.softmax(state["range_temp"].exp() * products, dim=1)
    distance = torch.arange(-radius, radius + 1).to(guidance) / radius
    squared = distance[:, None] ** 2 + distance[None, :] ** 2
    in_space = torch.exp(-squared / (2 * state["sigma_spatial"] ** 2)).view(1, -1, 1, 1)
    kernel = in_range * in_space
    kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
    correction = pointwise(functional.gelu(pointwise(torch.cat([kernel, guidance], 1), "fixup_in")), "fixup_out")
    large = functional.interpolate(source, (height, width), mode="bicubic", align_corners=False)
    return (windows(large) * (kernel + 0.1 * correction)[:, None]).sum(2)


def leaves(jbu: JBU) -> dict[str, Tensor]:
    """The parameters of the first stage, in float64, on their own graph."""
    return {name: p.detach().double().requires_grad_() for name, p in jbu.stages[0].named_parameters()}


@pytest.mark.parametrize(
    ("low", "high", "radius", "key_dim"),
    [((5, 6), (10, 12), 3, 32), ((4, 5), (7, 9), 1, 8), ((7, 4), (11, 8), 2, 3)],
    ids=["usual", "radius1", "radius2"],
)
def test_stage_and_its_gradients_by_the_paper(
    low: tuple[int, int], high: tuple[int, int], radius: int, key_dim: int
) -> None:
    jbu = random_jbu(CHANNELS, seed=4, stages=1, radius=radius, key_dim=key_dim)
    state = leaves(jbu)
    source, guidance, weights = random(2, *low, CHANNELS), random(2, *high, 3), random(2, *high, CHANNELS)
    their_source, their_guidance = (t.double().movedim(-1, 1).requires_grad_() for t in (source, guidance))
    expected = equations_5_to_7(state, their_source, their_guidance, radius)
    torch.autograd.backward(expected, weights.double().movedim(-1, 1))

    with torch.no_grad():
        inferred = torch.cat([jbu.run_stage(0, source[i : i + 1], guidance[i : i + 1]) for i in range(2)])
    assert relative_error(inferred, expected.detach().movedim(1, -1)) <= TOLERANCE, "output of the cpu backend"

    jbu.double()
    our_source, our_guidance = (t.double().requires_grad_() for t in (source, guidance))
    trained = torch.cat([jbu.run_stage(0, our_source[i : i + 1], our_guidance[i : i + 1]) for i in range(2)])
    torch.autograd.backward(trained, weights.double())
    assert relative_error(trained.detach(), expected.detach().movedim(1, -1)) <= TOLERANCE, "output"
    for name, ours, theirs in (("source", our_source, their_source), ("guidance", our_guidance, their_guidance)):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad.movedim(1, -1)) <= TOLERANCE, f"gradient of {name}"
    for name, parameter in jbu.stages[0].named_parameters():
        gradient = state[name].grad
        assert gradient is not None
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradient) <= TOLERANCE, f"gradient of {name}"


def test_stage_at_its_limits() -> None:
    """Keys that shut out the centre and a Gaussian that shuts out the rest: the sum falls below the clamp of 1e-7."""
    jbu = random_jbu(seed=4, stages=1).requires_grad_(False)
    stage = jbu.stages[0]
    assert isinstance(stage, JBUStage)
    stage.range_temp.fill_(3.0)
    stage.sigma_spatial.fill_(0.05)
    source, guidance = random(1, 5, 6, CHANNELS), 3 * random(1, 10, 12, 3)
    planes = [t.double().movedim(-1, 1) for t in (source, guidance)]
    expected = equations_5_to_7(leaves(jbu), planes[0], planes[1], 3).detach().movedim(1, -1)
    assert relative_error(jbu.run_stage(0, source, guidance), expected) <= TOLERANCE
    kernel = stage(guidance).flatten(-2)
    stage.fixup_out.weight.zero_()
    stage.fixup_out.bias.zero_()
    sums = stage(guidance).flatten(-2).sum(-1)
    assert kernel.isfinite().all()
    assert sums.max() > 0.99
    assert sums.min() < 0.5, "no pixel reached the clamp"


def test_temperature_is_held_within_its_limits() -> None:
    stage = random_jbu(seed=4).requires_grad_(False).stages[0]
    assert isinstance(stage, JBUStage)
    guidance = random(1, 10, 12, 3)

    def at(range_temp: float) -> Tensor:
        stage.range_temp.fill_(range_temp)
        filters: Tensor = stage(guidance)
        return filters

    assert at(100.0).isfinite().all(), "exp(100) is beyond float32"
    assert relative_error(at(-100.0), at(math.log(1e-4))) <= TOLERANCE
    assert relative_error(at(-100.0), at(math.log(1e-3))) > TOLERANCE


def test_stack_by_the_paper() -> None:
    """Four stages, each guided by the image at its size, then the residual map of channels; ImageNet's colours."""
    jbu = random_jbu(seed=5)
    features, image = random(2, 4, 5, CHANNELS), picture(2, 64, 80, 3)
    x = features.double().movedim(-1, 1)
    colours = (image.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    for stage, side in enumerate((8, 16, 32, 64)):
        state = {name: p.detach().double() for name, p in jbu.stages[stage].named_parameters()}
        small = functional.adaptive_avg_pool2d(colours.movedim(-1, 1), (side, side * 5 // 4))
        x = equations_5_to_7(state, x, small, 3)
    weight, bias = jbu.fixup.weight.double(), jbu.fixup.bias.double()
    expected = x.movedim(1, -1)
    expected = (expected + 0.1 * (expected @ weight.T + bias)).detach()
    with torch.no_grad():
        assert relative_error(jbu(features, image, (64, 80)), expected) <= TOLERANCE, "no grad"
    assert relative_error(jbu(features, image, (64, 80)).detach(), expected) <= TOLERANCE, "with grad"


def test_jbu_says_how_far_it_goes() -> None:
    jbu = random_jbu(stages=2)
    with pytest.raises(
        GeometryError, match=r"\(4, 5\) to \(20, 20\) .* takes 3 2x stages and the stack has 2.*\(16, 20\).* --stages 3"
    ):
        jbu(random(1, 4, 5, CHANNELS), picture(1, 20, 20, 3), (20, 20))
    with pytest.raises(GeometryError, match=r"jbu: made for 5 channels, got features of 4"):
        jbu(random(1, 4, 5, 4), picture(1, 20, 20, 3), (8, 10))


def test_dropout_drops_whole_channels_of_an_image() -> None:
    """Of keys that miss different channels at each position no product would tell whether they are alike."""
    torch.manual_seed(0)
    jbu = JBU(CHANNELS, stages=1, dropout=0.5, end_dropout=0.0)
    features, image = random(2, 5, 6, CHANNELS), picture(2, 10, 12, 3)

    def trained(tile_pixels: int) -> Tensor:
        jbu.tile_pixels = tile_pixels
        torch.manual_seed(1)
        return jbu(features, image, (10, 12)).detach()

    assert torch.equal(trained(12), trained(10000)), "tiles of an image miss different channels"
    grey = torch.full((1, 10, 12, 3), 77, dtype=torch.uint8)
    same = jbu(torch.ones(1, 5, 6, CHANNELS), grey, (10, 12)).detach()
    torch.testing.assert_close(same, same[:, :1, :1].expand_as(same))
    alike = jbu(features[:1].expand(2, -1, -1, -1), image[:1].expand(2, -1, -1, -1), (10, 12)).detach()
    assert not torch.equal(alike[0], alike[1]), "images of a batch share their mask"
    assert jbu.eval().stages[0].sample_dropout() is None


def test_every_parameter_learns() -> None:
    jbu = random_jbu(stages=2)
    jbu(random(1, 3, 4, CHANNELS), picture(1, 12, 16, 3), (12, 16)).square().sum().backward()
    for name, parameter in jbu.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


class Golden:
    """What the original implementation gave, channels-last, and our stack with its weights."""

    def __init__(self, arrays: Any, folder: Path) -> None:
        self.arrays = arrays
        self.folder = folder

    def map(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name]).movedim(1, -1)

    def state(self, case: str, kind: str, prefix: str = "") -> dict[str, Tensor]:
        prefix_in_file = f"{case}/{kind}/"
        names = [name for name in self.arrays.files if name.startswith(prefix_in_file)]
        return {prefix + name.removeprefix(prefix_in_file): torch.from_numpy(self.arrays[name]) for name in names}

    def jbu(self, state: dict[str, Tensor]) -> JBU:
        """Through an official checkpoint; the reference values were made from guidance normalised before."""
        torch.save({"state_dict": state}, self.folder / "official.ckpt")
        jbu = load_jbu(self.folder / "official.ckpt")
        jbu.guidance_mean, jbu.guidance_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return jbu


@pytest.fixture
def golden(shared: Path, tmp_path: Path) -> Iterator[Golden]:
    with np.load(shared / "golden" / "featup_reference.npz") as arrays:
        yield Golden(arrays, tmp_path)


@pytest.mark.parametrize("case", ["jbu_stack", "jbu_stack_oddguide"])
def test_stack_gives_what_the_original_gave(golden: Golden, case: str) -> None:
    jbu = golden.jbu(golden.state("jbu_stack", "state_dict", "upsampler."))
    source, guidance, expected = (
        golden.map("jbu_stack/source"),
        golden.map(f"{case}/guidance"),
        golden.map(f"{case}/output"),
    )
    size = (expected.shape[1], expected.shape[2])
    with torch.no_grad():
        assert relative_error(jbu(source, guidance, size), expected) <= TOLERANCE, "cpu backend"
    source.requires_grad_()
    assert relative_error(jbu(source, guidance, size).detach(), expected) <= TOLERANCE, "torch backend"


def test_stage_gives_what_the_original_gave(golden: Golden) -> None:
    source, guidance = golden.map("jbu_stage/source"), golden.map("jbu_stage/guidance")
    channels = source.shape[-1]
    rest = {"fixup_proj.1.weight": torch.zeros(channels, channels, 1, 1), "fixup_proj.1.bias": torch.zeros(channels)}
    jbu = golden.jbu(golden.state("jbu_stage", "state_dict", "up1.") | rest).requires_grad_(True)

    def run() -> Tensor:
        return torch.cat([jbu.run_stage(0, s[None], g[None]) for s, g in zip(source, guidance, strict=True)])

    with torch.no_grad():
        assert relative_error(run(), golden.map("jbu_stage/output")) <= TOLERANCE, "output of the cpu backend"
    source.requires_grad_()
    guidance.requires_grad_()
    result = run()
    assert relative_error(result.detach(), golden.map("jbu_stage/output")) <= TOLERANCE, "output"
    torch.autograd.backward(result, golden.map("jbu_stage/grad_output"))
    for name, tensor in (("source", source), ("guidance", guidance)):
        assert tensor.grad is not None
        assert relative_error(tensor.grad, golden.map(f"jbu_stage/grad_{name}")) <= TOLERANCE, f"gradient of {name}"
    theirs = golden.state("jbu_stage", "grads")
    layers = {
        "range_in": "range_proj.0",
        "range_out": "range_proj.3",
        "fixup_in": "fixup_proj.0",
        "fixup_out": "fixup_proj.3",
    }
    parameters = dict(jbu.stages[0].named_parameters())
    assert len(parameters) == len(theirs)
    for name, parameter in parameters.items():
        layer, _, leaf = name.rpartition(".")
        expected = theirs[f"{layers[layer]}.{leaf}" if layer else name]
        assert parameter.grad is not None
        assert relative_error(parameter.grad, expected.view_as(parameter)) <= TOLERANCE, f"gradient of {name}"

"""Losses against the original's values, against their formulas pair by pair, and on cases worked out by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from featup.errors import GeometryError
from featup.training.losses import (
    blur_pin,
    explained_variance,
    magnitude,
    reconstruction,
    sample_positions,
    sampled_crf,
    scale_and_shift_invariant,
    total_variation,
)

TOLERANCE = 1e-5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def golden(shared: Path, prefix: str) -> dict[str, NDArray[Any]]:
    with np.load(shared / "golden" / "featup_reference.npz") as values:
        return {key.removeprefix(f"{prefix}/"): values[key] for key in values if key.startswith(f"{prefix}/")}


def channels_last(planes: NDArray[Any]) -> Tensor:
    return torch.from_numpy(planes).permute(0, 2, 3, 1)


# Against the original


def test_crf_equals_the_original(shared: Path) -> None:
    values = golden(shared, "crf")
    found = sampled_crf(
        channels_last(values["features"]),
        channels_last(values["guidance"]),
        torch.from_numpy(values["rows"]),
        torch.from_numpy(values["cols"]),
    )
    assert float(found) == pytest.approx(float(values["loss"]), rel=TOLERANCE)


def test_total_variation_equals_the_original(shared: Path) -> None:
    values = golden(shared, "tv")
    assert float(total_variation(channels_last(values["features"]))) == pytest.approx(
        float(values["loss"]), rel=TOLERANCE
    )


def test_scale_and_shift_equals_the_original(shared: Path) -> None:
    values = golden(shared, "ssi")
    found = scale_and_shift_invariant(*(torch.from_numpy(values[key]) for key in ("prediction", "target", "mask")))
    assert float(found) == pytest.approx(float(values["loss"]), rel=TOLERANCE)


# Reconstruction


def test_reconstruction_is_the_mean_squared_error() -> None:
    prediction, target = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    assert float(reconstruction(prediction, target)) == pytest.approx(
        float(torch.nn.functional.mse_loss(prediction, target))
    )


def test_reconstruction_with_uncertainty_is_a_likelihood() -> None:
    prediction, target = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    log_s = random(2, 3, 4, 1)
    deviation = log_s.exp().expand_as(prediction)
    log_density = torch.distributions.Normal(target, deviation).log_prob(prediction)  # type: ignore[no-untyped-call]
    constant = 0.5 * np.log(2 * np.pi)
    assert float(reconstruction(prediction, target, log_s)) == pytest.approx(float(-log_density.mean() - constant))


def test_uncertainty_is_least_at_the_error() -> None:
    prediction, target = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    best = ((prediction - target).square().mean(-1, keepdim=True).log() / 2).requires_grad_()
    (gradient,) = torch.autograd.grad(reconstruction(prediction, target, best), best)
    assert float(gradient.abs().max()) < 1e-12


# CRF


def test_crf_equals_its_formula() -> None:
    features, guidance = random(2, 7, 5, 4), random(2, 7, 5, 3) / 2
    rows, cols = sample_positions((7, 5), 6, torch.Generator().manual_seed(0))
    total = 0.0
    for b in range(2):
        for r, c in zip(rows.tolist(), cols.tolist(), strict=True):
            for i, j in zip(rows.tolist(), cols.tolist(), strict=True):
                place = ((r - i) / 7) ** 2 + ((c - j) / 5) ** 2
                colour = float((guidance[b, r, c] - guidance[b, i, j]).square().sum())
                kernel = 10 * np.exp(-place / 0.2 - colour / 0.3) + 3 * np.exp(-place / 0.01)
                total += kernel * float((features[b, r, c] - features[b, i, j]).square().sum())
    found = sampled_crf(features, guidance, rows, cols)
    assert float(found) == pytest.approx(total / (2 * 6 * 6), rel=TOLERANCE)


def test_crf_does_not_lose_its_digits_far_from_zero() -> None:
    features, guidance = random(1, 9, 8, 4), random(1, 9, 8, 3) / 2
    where = sample_positions((9, 8), 40, torch.Generator().manual_seed(0))
    exact = sampled_crf(features, guidance, *where)
    shifted = sampled_crf((features + 100).float(), guidance.float(), *where)
    assert float(shifted) == pytest.approx(float(exact), rel=1e-4)
    assert float(sampled_crf(torch.full((1, 9, 8, 4), 7.3), guidance.float(), *where)) == pytest.approx(0, abs=1e-9)


def test_crf_of_one_position_is_zero() -> None:
    one = torch.tensor([2])
    assert float(sampled_crf(random(2, 7, 5, 4), random(2, 7, 5, 3), one, one)) == 0


def test_positions_follow_the_seed_and_cover_the_map() -> None:
    rows, cols = sample_positions((4, 9), 2000, torch.Generator().manual_seed(3))
    assert (set(rows.tolist()), set(cols.tolist())) == (set(range(4)), set(range(9)))
    again = sample_positions((4, 9), 2000, torch.Generator().manual_seed(3))
    assert torch.equal(rows, again[0])
    assert torch.equal(cols, again[1])
    assert not torch.equal(rows, sample_positions((4, 9), 2000, torch.Generator().manual_seed(4))[0])


# Regularisers


def test_total_variation_of_a_ramp() -> None:
    rows = torch.arange(4.0).view(1, 4, 1, 1).expand(2, 4, 5, 3) * 2
    # 3 of 4 rows have a neighbour above, 2 away.
    assert float(total_variation(rows)) == pytest.approx(4 * 3 / 4)
    assert float(total_variation(rows.transpose(1, 2))) == pytest.approx(4 * 3 / 4)
    assert float(total_variation(torch.ones(1, 1, 1, 3))) == 0


def test_magnitude_sees_lengths_only() -> None:
    target = torch.tensor([3.0, 4.0]).expand(1, 2, 2, 2)
    assert float(magnitude(torch.tensor([-5.0, 0.0]).expand(1, 2, 2, 2), target)) == pytest.approx(0)
    assert float(magnitude(torch.tensor([0.0, 2.0]).expand(1, 2, 2, 2), target)) == pytest.approx(9)


def test_magnitude_of_nothing_has_a_finite_gradient() -> None:
    nothing = torch.zeros(1, 2, 2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(magnitude(nothing, torch.ones(1, 2, 2, 3)), nothing)
    assert gradient.isfinite().all()


def test_blur_pin_compares_patch_means() -> None:
    coarse = random(2, 2, 3, 4)
    fine = coarse.repeat_interleave(3, 1).repeat_interleave(2, 2)
    assert float(blur_pin(fine, coarse)) == pytest.approx(0, abs=1e-12)
    wiggle = torch.tensor([1.0, -1.0]).repeat(3).view(1, 1, 6, 1)
    assert float(blur_pin(fine + wiggle, coarse)) == pytest.approx(0, abs=1e-12)
    fine[:, 0, 0] += 6
    # One pixel of six in one cell of six is off.
    assert float(blur_pin(fine, coarse)) == pytest.approx(1 / 6)


# Depth


def depth_pair(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    return random(*shape), random(*shape, seed=1), mask


def test_scale_and_shift_do_not_matter() -> None:
    prediction, target, mask = depth_pair(2, 9, 7)
    loss = float(scale_and_shift_invariant(prediction, target, mask))
    assert loss > 0.1
    changed = prediction * torch.tensor([3.0, -0.2]).view(2, 1, 1) + torch.tensor([-40.0, 5.0]).view(2, 1, 1)
    assert float(scale_and_shift_invariant(changed, target, mask)) == pytest.approx(loss)
    assert float(scale_and_shift_invariant(target * 2 - 1, target, mask)) == pytest.approx(0, abs=1e-12)


def test_scale_and_shift_equals_least_squares_and_loops() -> None:
    prediction, target, mask = depth_pair(2, 9, 7)
    squares, pixels = 0.0, 0
    gradients, counts = [0.0] * 4, [0] * 4
    for b in range(2):
        known = mask[b].numpy()
        x, y = prediction[b].numpy(), target[b].numpy()
        (scale, shift), *_ = np.linalg.lstsq(np.stack([x[known], np.ones(known.sum())], 1), y[known], rcond=None)
        error = scale * x + shift - y
        squares += float((error[known] ** 2).sum())
        pixels += int(known.sum())
        for level in range(4):
            part, there = error[:: 2**level, :: 2**level], known[:: 2**level, :: 2**level]
            counts[level] += int(there.sum())
            for i, j in np.argwhere(there):
                for k, m in ((i + 1, j), (i, j + 1)):
                    if k < part.shape[0] and m < part.shape[1] and there[k, m]:
                        gradients[level] += abs(part[k, m] - part[i, j])
    expected = squares / (2 * pixels) + 0.5 * sum(g / max(c, 1) for g, c in zip(gradients, counts, strict=True))
    assert float(scale_and_shift_invariant(prediction, target, mask)) == pytest.approx(expected)


def test_what_is_masked_out_is_not_looked_at() -> None:
    prediction, target, mask = depth_pair(2, 9, 7)
    loss = float(scale_and_shift_invariant(prediction, target, mask))
    prediction = prediction.masked_fill(~mask, float("inf")).requires_grad_()
    target = target.masked_fill(~mask, float("nan"))
    found = scale_and_shift_invariant(prediction, target, mask)
    assert found.item() == pytest.approx(loss)
    assert scale_and_shift_invariant(prediction, target, mask.float()).item() == pytest.approx(loss)
    (gradient,) = torch.autograd.grad(found, prediction)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()


def test_images_without_valid_pixels_do_not_count() -> None:
    prediction, target, mask = depth_pair(2, 9, 7)
    alone = float(scale_and_shift_invariant(prediction[:1], target[:1], mask[:1]))
    mask[1] = False
    assert float(scale_and_shift_invariant(prediction, target, mask)) == pytest.approx(alone)


@pytest.mark.parametrize("case", ["no-pixel", "one-pixel", "constant", "constant-but-for-rounding"])
def test_degenerate_depth_is_finite(case: str) -> None:
    prediction, target, noise = depth_pair(2, 9, 7)
    mask = torch.zeros(2, 9, 7, dtype=torch.bool)
    if case == "one-pixel":
        mask[:, 4, 4] = True
    elif case.startswith("constant"):
        mask[:] = True
        prediction = torch.full_like(prediction, 7.7)
    if case == "constant-but-for-rounding":
        rounded = torch.where(noise, 1 + torch.finfo(torch.float32).eps, 1)
        prediction, target = prediction.float() * rounded, target.float()
    prediction.requires_grad_()
    loss = scale_and_shift_invariant(prediction, target, mask)
    (gradient,) = torch.autograd.grad(loss, prediction)
    if case in ("no-pixel", "one-pixel"):
        assert loss.item() == pytest.approx(0, abs=1e-12)
    else:
        best = target.mean((1, 2), keepdim=True).expand_as(target)
        assert loss.item() == pytest.approx(float(scale_and_shift_invariant(best, target, mask)), rel=1e-4)
    assert float(gradient.abs().max()) < 1


# Explained variance


def test_explained_variance() -> None:
    target = random(2, 5, 6, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([10.0, -3.0, 0.0])
    mean = target.mean((0, 1, 2)).expand_as(target)
    assert float(explained_variance(target, target)) == 1
    assert float(explained_variance(mean, target)) == pytest.approx(0, abs=1e-12)
    assert float(explained_variance((mean + target) / 2, target)) == pytest.approx(0.75)
    assert float(explained_variance(mean * 2 - target, target)) == pytest.approx(-3)


def test_explained_variance_of_a_constant() -> None:
    constant = torch.full((1, 2, 2, 3), 4.0)
    assert float(explained_variance(constant, constant)) == 1
    assert float(explained_variance(constant + 1, constant)) == -float("inf")


# All of them

_WHERE = (torch.tensor([0, 2, 1, 2]), torch.tensor([1, 0, 1, 2]))
_MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool().expand(2, 3, 3)

CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "reconstruction": (reconstruction, [(2, 2, 3, 2)] * 2),
    "uncertainty": (reconstruction, [(2, 2, 3, 2), (2, 2, 3, 2), (2, 2, 3, 1)]),
    "crf": (lambda f, g: sampled_crf(f, g, *_WHERE), [(2, 3, 3, 2), (2, 3, 3, 3)]),
    "total-variation": (total_variation, [(2, 3, 2, 2)]),
    "magnitude": (magnitude, [(2, 2, 3, 2)] * 2),
    "blur-pin": (blur_pin, [(2, 4, 3, 2), (2, 2, 1, 2)]),
    "depth": (lambda p, t: scale_and_shift_invariant(p, t, _MASK), [(2, 3, 3)] * 2),
}


@pytest.mark.parametrize(("loss", "shapes"), CASES.values(), ids=CASES.keys())
def test_gradcheck(loss: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    inputs = tuple(random(*shape, seed=index).requires_grad_() for index, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(loss, inputs)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(GeometryError, match="reconstruction: the shapes must be the same"):
        reconstruction(random(1, 2, 2, 3), random(1, 2, 2, 1))
    with pytest.raises(GeometryError, match="give a log sigma per position"):
        reconstruction(random(1, 2, 2, 3), random(1, 2, 2, 3), random(1, 2, 2))
    with pytest.raises(GeometryError, match="bring the guidance"):
        sampled_crf(random(1, 3, 3, 2), random(1, 6, 6, 3), *_WHERE)
    with pytest.raises(GeometryError, match="N > 0"):
        sampled_crf(random(1, 3, 3, 2), random(1, 3, 3, 3), _WHERE[0][:0], _WHERE[1][:0])
    with pytest.raises(GeometryError, match="whole multiples"):
        blur_pin(random(1, 5, 4, 2), random(1, 2, 2, 2))
    with pytest.raises(GeometryError, match="the shapes must be the same"):
        scale_and_shift_invariant(random(1, 3, 3), random(1, 3, 3), torch.ones(3, 3))

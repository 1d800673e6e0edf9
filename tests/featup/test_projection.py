"""PCA against numpy's singular value decomposition in float64."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from featup.errors import GeometryError
from featup.projection import PCA, PCAFit
from tests.featup.support import TOLERANCE, relative_error

CHANNELS = 12


def correlated(count: int, channels: int = CHANNELS, mean: float = 0.0, seed: int = 0) -> Tensor:
    """Vectors whose spread differs in every direction, none of them along a channel."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(channels, channels)))
    spread = 2.0 ** -np.arange(channels)
    return torch.from_numpy(rng.normal(size=(count, channels)) * spread @ turn + mean)


def fit(*pieces: Tensor, components: int = 4) -> PCA:
    accumulated = PCAFit(pieces[0].shape[-1])
    for piece in pieces:
        accumulated.add(piece)
    return accumulated.solve(components)


def by_svd(data: Tensor, components: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Projection directions, the variance along each, and its share of the total variance."""
    vectors = data.numpy().astype(np.float64)
    _, singular, basis = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    variance = singular**2 / len(vectors)
    return basis[:components], variance[:components], variance[:components].sum() / variance.sum()


def reconstruct(pca: PCA, data: Tensor) -> Tensor:
    return pca.project(data) @ pca.components.to(data) + pca.mean.to(data)


def assert_equals_svd(pca: PCA, data: Tensor, components: int) -> None:
    basis, variance, ratio = by_svd(data, components)
    aligned = np.abs((pca.components.double().numpy() * basis).sum(1))
    np.testing.assert_allclose(aligned, 1, atol=TOLERANCE, err_msg="each component, up to its sign")
    np.testing.assert_allclose(pca.variance.numpy(), variance, rtol=TOLERANCE * 10, err_msg="variance")
    np.testing.assert_allclose(pca.mean.numpy(), data.numpy().mean(0), atol=TOLERANCE, rtol=TOLERANCE, err_msg="mean")
    assert pca.explained_variance_ratio == pytest.approx(ratio, abs=TOLERANCE)
    assert pca.count == len(data)
    assert {pca.components.dtype, pca.mean.dtype, pca.variance.dtype} == {torch.float32}


@pytest.mark.parametrize("components", [1, 4, CHANNELS])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_equals_svd(components: int, mean: float) -> None:
    data = correlated(300, mean=mean)
    assert_equals_svd(fit(data, components=components), data, components)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Offsets of 1e6 with spreads down to 2^-11: sums about zero would leave nothing of the small ones."""
    data = correlated(500, mean=1e6)
    assert_equals_svd(fit(*torch.split(data, 37), components=CHANNELS), data, CHANNELS)


def test_pieces_equal_the_whole() -> None:
    data = correlated(301, mean=5.0)
    whole, pieces = fit(data), fit(*torch.split(data, [1, 100, 7, 193]))
    maps = fit(data[:300].reshape(2, 10, 15, CHANNELS), data[300:])
    for one in (pieces, maps):
        for name in ("components", "mean", "variance"):
            assert relative_error(getattr(one, name), getattr(whole, name)) <= TOLERANCE, name
        assert one.explained_variance_ratio == pytest.approx(whole.explained_variance_ratio, abs=TOLERANCE)
        assert one.count == whole.count == 301


def test_the_sign_is_fixed() -> None:
    data = correlated(200)
    for one in (fit(data, components=CHANNELS), fit(-data, components=CHANNELS)):
        largest = one.components.abs().argmax(1, keepdim=True)
        assert (one.components.gather(1, largest) > 0).all()
    assert relative_error(fit(-data).components, fit(data).components) <= TOLERANCE


def test_components_are_orthonormal_and_in_order() -> None:
    pca = fit(correlated(200), components=CHANNELS)
    assert relative_error(pca.components @ pca.components.T, torch.eye(CHANNELS)) <= TOLERANCE
    assert (pca.variance.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_and_reconstruct(dtype: torch.dtype) -> None:
    data = correlated(240, mean=2.0).to(dtype).reshape(4, 6, 10, CHANNELS)
    full, part = fit(data, components=CHANNELS), fit(data, components=3)
    assert part.project(data).shape == (4, 6, 10, 3)
    assert part.project(data).dtype == dtype
    assert relative_error(reconstruct(full, data), data) <= TOLERANCE, "nothing is lost with every component"
    flat = part.project(data).reshape(-1, 3)
    assert flat.mean(0).abs().max() <= TOLERANCE * 10, "projected features are centred"
    assert relative_error(flat.double().var(0, correction=0), part.variance.double()) <= TOLERANCE * 10
    lost = (reconstruct(part, data) - data).square().sum()
    total = (data - data.mean((0, 1, 2))).square().sum()
    assert float(1 - lost / total) == pytest.approx(part.explained_variance_ratio, abs=TOLERANCE)


def test_as_channel_map_is_project() -> None:
    data = correlated(100, mean=2.0).float()
    pca = fit(data)
    mapped = pca.as_channel_map()
    assert relative_error(data @ mapped.weight.T + mapped.bias, pca.project(data)) <= TOLERANCE


def test_vectors_that_are_not_finite_are_left_out() -> None:
    data = correlated(100)
    spoilt = torch.cat([data[:50], data[:3].clone(), data[50:]])
    spoilt[50, 0], spoilt[51, 3], spoilt[52] = torch.nan, torch.inf, -torch.inf
    result, expected = fit(torch.full((2, CHANNELS), torch.nan), spoilt), fit(data)
    assert result.count == 100
    assert relative_error(result.components, expected.components) <= TOLERANCE


def test_data_without_variance() -> None:
    pca = fit(torch.full((9, 4), 0.1), components=2)
    assert pca.explained_variance_ratio == 1.0
    assert torch.equal(pca.variance, torch.zeros(2))
    assert relative_error(pca.mean, torch.full((4,), 0.1)) <= TOLERANCE


def test_half_precision_and_gradients_are_accepted() -> None:
    data = correlated(100).half().requires_grad_()
    result, expected = fit(data), fit(data.detach().double())
    assert relative_error(result.components, expected.components) <= TOLERANCE
    assert not result.components.requires_grad


@pytest.mark.parametrize(
    ("count", "components", "text"),
    [
        (100, 13, "13 components of 12 channels from 100"),
        (100, 0, "0 components"),
        (4, 4, "from 4 vectors"),
        (0, 1, "from 0"),
    ],
    ids=["too-many", "none", "too-few-vectors", "no-vectors"],
)
def test_components_that_cannot_be(count: int, components: int, text: str) -> None:
    with pytest.raises(GeometryError, match=rf"PCA: .*{text}.*; ask for at most"):
        fit(correlated(count), components=components)


@pytest.mark.parametrize("channels", [1, 11, 13])
def test_vectors_of_other_channels(channels: int) -> None:
    """Bug: maps of one channel were broadcast into a fit of many."""
    with pytest.raises(
        GeometryError, match=rf"PCA: fitted on 12 channels, got vectors of {channels} in \(5, {channels}\)"
    ):
        PCAFit(CHANNELS).add(torch.zeros(5, channels))

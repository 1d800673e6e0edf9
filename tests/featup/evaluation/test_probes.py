from pathlib import Path

import pytest
import torch
from torch import Tensor

from featup.checkpoints import load_probe, probe_bytes
from featup.errors import GeometryError, WeightsError
from featup.evaluation.probes import cell_depth, cell_shares, fit_depth, fit_segmentation

NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_shares_of_cells_by_hand() -> None:
    labels = torch.tensor([[[0, 1, 1, 1], [0, 0, 255, 1], [2, 2, 0, 255], [2, 2, 255, 255]]])
    shares = cell_shares(labels, (2, 2), 3)
    assert shares[0].tolist() == [[[0.75, 0.25, 0], [0, 0.75, 0]], [[0, 0, 1], [0.25, 0, 0]]]


def test_cells_need_not_be_square() -> None:
    labels = torch.arange(2).repeat_interleave(6).view(1, 2, 6)
    assert cell_shares(labels, (1, 3), 2)[0].tolist() == [[[0.5, 0.5]] * 3]
    with pytest.raises(GeometryError, match="no whole pixels"):
        cell_shares(labels, (2, 4), 2)


def test_depth_of_cells_is_the_mean_of_what_is_known() -> None:
    depth = torch.tensor([[[1.0, 3.0, NAN, NAN], [NAN, 5.0, 0.0, NAN]]])
    assert cell_depth(depth, (1, 2))[0].tolist() == [[[3.0, 0.75], [0.0, 0.0]]]


def test_softmax_regression_finds_the_best_solution_there_is() -> None:
    """Against plain gradient descent on the same problem in float64, to convergence."""
    features = normal(300, 5, seed=1) * torch.tensor([1.0, 3.0, 0.2, 1.0, 0.05]) + 2
    shares = (features @ normal(5, 3, seed=2)).softmax(1)
    probe = fit_segmentation(features, shares, torch.arange(300) // 10, [1e-2])
    x, scale = features.double(), features.double().std()

    def objective(weight: Tensor, bias: Tensor) -> Tensor:
        logs = (x @ weight.T + bias).log_softmax(1)
        return 1e-2 * (weight * scale).square().sum() - (logs * shares).sum() / shares.sum()

    weight, bias = torch.zeros(3, 5).double().requires_grad_(), torch.zeros(3).double().requires_grad_()
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=2000, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective(weight, bias)
        loss.backward()
        return loss

    optimiser.step(closure)
    best = float(objective(weight, bias).detach())
    ours = float(objective(probe.channel_map.weight.double(), probe.channel_map.bias.double()))
    assert ours == pytest.approx(best, abs=1e-5)
    assert (probe.channel_map.weight - weight.detach()).abs().max() < 0.02


def test_a_linear_segmentation_is_recovered() -> None:
    features, truth = normal(1200, 6, seed=3), normal(4, 6, seed=4)
    classes = (features @ truth.T).argmax(1)
    probe = fit_segmentation(features, torch.eye(4)[classes], torch.arange(1200) // 40)
    fresh = normal(500, 6, seed=5)
    predicted = (fresh @ probe.channel_map.weight.T + probe.channel_map.bias).argmax(1)
    assert (predicted == (fresh @ truth.T).argmax(1)).float().mean() > 0.97
    assert probe.weight_decay <= 1e-4, "without noise, the weakest decays are the best"


def test_vectors_without_a_label_make_no_difference() -> None:
    features = normal(200, 4, seed=6)
    shares = torch.eye(3)[(features @ normal(4, 3, seed=7)).argmax(1)]
    groups = torch.arange(200) // 20
    probe = fit_segmentation(features, shares, groups, [1e-2, 1e-3])
    more = torch.cat([features, 1e3 * normal(50, 4, seed=8)])
    again = fit_segmentation(
        more, torch.cat([shares, torch.zeros(50, 3)]), torch.cat([groups, torch.full((50,), 99)]), [1e-2, 1e-3]
    )
    assert torch.equal(probe.channel_map.weight, again.channel_map.weight)
    assert (probe.vectors, probe.held_out) == (again.vectors, again.held_out)
    assert probe.vectors == 200


def test_cross_validation_takes_a_strong_decay_for_labels_without_sense_and_a_weak_one_for_clear_ones() -> None:
    features, groups = normal(1200, 20, seed=9), torch.arange(1200) // 40
    noise = torch.eye(3)[torch.randint(0, 3, (1200,), generator=torch.Generator().manual_seed(10))]
    clear = torch.eye(3)[(features @ normal(20, 3, seed=11)).argmax(1)]
    assert fit_segmentation(features, noise, groups).weight_decay == 1e-1
    assert fit_segmentation(features, clear, groups).weight_decay <= 3e-3


def test_cross_validation_leaves_out_whole_images() -> None:
    """Vectors of an image share one label by chance; across images the features tell nothing."""
    images = normal(24, 30, seed=12)
    features = images.repeat_interleave(20, 0) + 0.01 * normal(480, 30, seed=13)
    labels = torch.eye(2)[torch.arange(24) // 2 % 2].repeat_interleave(20, 0)
    groups = torch.arange(24).repeat_interleave(20)
    assert fit_segmentation(features, labels, groups).weight_decay >= 1e-2
    assert fit_segmentation(features, labels, torch.arange(480) // 2 % 24).weight_decay < 1e-2


def test_the_fit_is_deterministic() -> None:
    features, shares = normal(100, 8, seed=14), normal(100, 3, seed=15).softmax(1)
    one, two = (fit_segmentation(features, shares, torch.arange(100) // 5) for _ in range(2))
    assert torch.equal(one.channel_map.weight, two.channel_map.weight)
    assert torch.equal(one.channel_map.bias, two.channel_map.bias)


def test_a_linear_depth_is_recovered_in_metres() -> None:
    features = normal(400, 7, seed=16) * 3 + 1
    truth = normal(7, seed=17)
    depth = torch.stack([features @ truth + 4, torch.ones(400)], 1)
    depth[::5] = torch.tensor([1e6, 0.0])
    probe = fit_depth(features, depth, torch.arange(400) // 10, [1e-8])
    assert torch.allclose(probe.channel_map.weight[0], truth, atol=1e-4), "vectors of weight 0 must not count"
    assert probe.channel_map.bias.item() == pytest.approx(4, abs=1e-3)


def test_ridge_regression_is_the_closed_form() -> None:
    features, weights = normal(60, 5, seed=18).double(), torch.rand(60, generator=torch.Generator().manual_seed(19))
    depth = normal(60, seed=20).double() + 3
    probe = fit_depth(features, torch.stack([depth, weights], 1), torch.arange(60) // 6, [0.3])
    share = weights.double() / weights.double().sum()
    inputs = features - share @ features
    scale = inputs.square().mean().sqrt()
    inputs = inputs / scale
    level = share @ depth
    normal_matrix = inputs.T @ torch.diag(share) @ inputs + 0.3 * torch.eye(5)
    expected = torch.linalg.solve(normal_matrix, inputs.T @ (share * (depth - level))) / scale
    assert torch.allclose(probe.channel_map.weight[0].double(), expected, atol=1e-6)


def test_one_image_is_too_few() -> None:
    with pytest.raises(GeometryError, match="1 images with labels are too few"):
        fit_segmentation(normal(10, 3), torch.ones(10, 2), torch.zeros(10))


def test_a_probe_is_read_back(tmp_path: Path) -> None:
    features, groups = normal(50, 4, seed=21), torch.arange(50) // 5
    probe = fit_depth(features, torch.stack([features[:, 0] + 2, torch.ones(50)], 1), groups)
    path = tmp_path / "probe.safetensors"
    path.write_bytes(probe_bytes(probe, seed=3))
    found = load_probe(path)
    assert torch.equal(found.channel_map.weight, probe.channel_map.weight)
    assert torch.equal(found.channel_map.bias, probe.channel_map.bias)
    assert (found.kind, found.weight_decay, found.held_out, found.vectors) == (
        "depth",
        probe.weight_decay,
        probe.held_out,
        50,
    )
    path.write_bytes(b"no probe")
    with pytest.raises(WeightsError, match="safetensors"):
        load_probe(path)

import math

import pytest
import torch

from featup.errors import GeometryError
from featup.evaluation import metrics

NAN = float("nan")


def test_counts_iou_and_accuracy_by_hand() -> None:
    target = torch.tensor([[[0, 0, 1], [1, 1, 255]]])
    prediction = torch.tensor([[[0, 1, 1], [1, 0, 2]]])
    counts = metrics.class_counts(prediction, target, 3)
    assert counts.tolist() == [[[1, 2, 0], [2, 3, 0], [2, 3, 0]]]
    # Class 0: 1 of 2 + 2 - 1; class 1: 2 of 3 + 3 - 2; class 2 does not occur, whatever was predicted.
    assert metrics.mean_iou(counts) == pytest.approx(100 * (1 / 3 + 2 / 4) / 2)
    assert metrics.pixel_accuracy(counts) == pytest.approx(100 * 3 / 5)


@pytest.mark.parametrize("unknown", [255, 3, -1], ids=["fill", "next_id", "negative"])
def test_a_pixel_without_a_label_never_counts(unknown: int) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 5, 7), generator=generator)
    target[:, :2] = unknown
    prediction = torch.randint(0, 3, (2, 5, 7), generator=generator)
    counts = metrics.class_counts(prediction, target, 3)
    assert torch.equal(counts, metrics.class_counts(prediction[:, 2:], target[:, 2:], 3))
    other = prediction.clone()
    other[:, :2] = (other[:, :2] + 1) % 3
    assert torch.equal(counts, metrics.class_counts(other, target, 3)), "a prediction without a label made a difference"


def test_a_set_is_not_the_mean_of_its_images() -> None:
    target = torch.tensor([[[0, 0, 0, 1]], [[1, 1, 1, 1]]])
    prediction = torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    counts = metrics.class_counts(prediction, target, 2)
    assert metrics.mean_iou(counts) == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    assert metrics.pixel_accuracy(counts) == pytest.approx(100 * 7 / 8)


def test_without_any_label_there_is_no_number() -> None:
    counts = metrics.class_counts(torch.zeros(1, 2, 3, dtype=torch.long), torch.full((1, 2, 3), 255), 4)
    assert math.isnan(metrics.mean_iou(counts))
    assert math.isnan(metrics.pixel_accuracy(counts))


def test_depth_by_hand() -> None:
    target = torch.tensor([[[1.0, 2.0, NAN], [4.0, 0.0, 1.0]]])
    prediction = torch.tensor([[[1.2, 3.0, 9.0], [4.0, 9.0, -5.0]]])
    sums = metrics.depth_sums(prediction, target, minimum=0.1)
    # Known: 1.2 for 1 (close), 3 for 2 (far), 4 for 4 (close), and -5, taken as 0.1, for 1 (far).
    assert sums.shape == (1, 3)
    assert sums[0].tolist() == pytest.approx([0.04 + 1 + 0 + 0.81, 2, 4])
    assert metrics.depth_rmse(sums) == pytest.approx(math.sqrt(1.85 / 4))
    assert metrics.depth_accuracy(sums) == pytest.approx(50)


def test_the_factor_of_depth_counts_both_ways_and_is_not_reached() -> None:
    target = torch.ones(1, 1, 4)
    prediction = torch.tensor([[[1.25, 1.2499, 0.8, 0.8001]]], dtype=torch.float64)
    assert metrics.depth_sums(prediction, target)[0, 1] == 2


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(GeometryError, match="one shape"):
        metrics.class_counts(torch.zeros(1, 2, 3), torch.zeros(1, 3, 2), 2)
    with pytest.raises(GeometryError, match="one shape"):
        metrics.depth_sums(torch.zeros(1, 2, 3), torch.zeros(1, 3, 2))


def test_drop_and_increase_by_hand() -> None:
    scores, map_scores = torch.tensor([0.8, 0.5, 0.4, 0.2]), torch.tensor([0.4, 0.6, 0.4, 0.05])
    assert metrics.average_drop(scores, map_scores) == pytest.approx(100 * (0.5 + 0 + 0 + 0.75) / 4)
    assert metrics.average_increase(scores, map_scores) == pytest.approx(25)


def test_the_bootstrap_is_seeded_and_paired() -> None:
    generator = torch.Generator().manual_seed(1)
    baseline = torch.rand(40, 2, generator=generator, dtype=torch.float64)

    def measure(statistics: torch.Tensor) -> float:
        return float(statistics.mean())

    def interval(ours: torch.Tensor, seed: int) -> metrics.Interval:
        values = (metrics.bootstrap(measure, statistics, 50, seed=seed) for statistics in (ours, baseline))
        return metrics.difference_interval(*values)

    first = interval(baseline + 0.25, 3)
    # The difference is the same for every image, so no draw of images changes it.
    assert (first.mean, first.low, first.high) == pytest.approx((0.25, 0.25, 0.25))
    noisy = torch.rand(40, 2, generator=generator, dtype=torch.float64)
    one, again, other = (interval(noisy, seed) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert one.low < one.mean < one.high


def test_the_bootstrap_is_as_wide_as_theory_says() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    interval = width(values, None)
    expected = 2 * 1.96 * float(values.std()) / math.sqrt(400)
    assert interval == pytest.approx(expected, rel=0.15)


def test_clusters_are_resampled_as_a_whole() -> None:
    """Four equal frames of each sequence: as wide as for the sequences alone, not half of it."""
    generator = torch.Generator().manual_seed(2)
    sequences = torch.randn(100, generator=generator, dtype=torch.float64)
    frames, clusters = sequences.repeat_interleave(4), torch.arange(100).repeat_interleave(4)
    assert width(frames, clusters) == pytest.approx(width(sequences, None), rel=1e-9)
    assert width(frames, None) == pytest.approx(width(sequences, None) / 2, rel=0.15)
    with pytest.raises(GeometryError, match="give one for each"):
        metrics.bootstrap(lambda one: float(one.mean()), frames, 5, clusters[1:])


def test_resamples_without_a_value_do_not_count() -> None:
    ours = torch.tensor([1.0, math.nan, 3.0], dtype=torch.float64)
    assert metrics.difference_interval(ours, torch.zeros(3)).mean == 2
    assert math.isnan(metrics.difference_interval(ours * math.nan, ours).low)


def width(values: torch.Tensor, clusters: torch.Tensor | None) -> float:
    """Of the interval of the values' mean."""
    resampled = metrics.bootstrap(lambda one: float(one.mean()), values, 1000, clusters)
    interval = metrics.difference_interval(resampled, torch.zeros(1000))
    return interval.high - interval.low

"""The measures of a method against the baseline, and their table."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.evaluation.results import compare
from pipeline.evaluation.table import table

MEASURES = {"mIoU": lambda scores: float(scores.mean()), "accuracy": lambda scores: float(scores.max())}


def test_measures_are_means_over_the_probes_with_their_spread() -> None:
    ours = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0])]
    baseline = [torch.tensor([1.0, 1.0])]
    numbers = compare(MEASURES, ours, baseline, resamples=50)
    assert numbers["measures"] == {"mIoU": 3.0, "accuracy": 4.5}
    assert numbers["spread"]["mIoU"] == pytest.approx(np.std([2, 4], ddof=1))
    assert numbers["difference"].keys() == {"mIoU"}, "of the first measure alone"
    difference = numbers["difference"]["mIoU"]
    assert difference["observed"] == 1.0, "of the first probes"
    assert 0 <= difference["low"] <= difference["high"] <= 2


def test_the_baseline_has_no_difference_and_one_probe_no_spread() -> None:
    ours = [torch.tensor([1.0, 3.0])]
    numbers = compare(MEASURES, ours, ours, resamples=50)
    assert numbers == {"measures": {"mIoU": 2.0, "accuracy": 3.0}, "difference": {}}


def test_a_line_for_each_method_and_a_column_for_each_measure() -> None:
    drop_in: dict[str, Any] = {"measures": {"mIoU": 50.0, "RMSE": 0.25}, "difference": {}}
    better = {
        "measures": {"mIoU": 52.5, "RMSE": 0.125},
        "spread": {"mIoU": 0.5},
        "difference": {"mIoU": {"observed": 2.5, "low": -1.0, "high": 4.0}},
    }
    views = {"measures": {"explained variance": 71.25}, "difference": {}, "seconds_per_image": 1.0}
    results = {
        "config": {"backbone": "vit", "size": "32x32", "norm": "layer", "resamples": 20, "retrained": False},
        "baseline": "bilinear",
        "probes": {"seg": "seg probe"},
        "data": {"seg val": {"images": 4}},
        "methods": {
            "bilinear": {"seg": {"drop-in": drop_in, "seconds_per_image": 0.002}, "seg views": views},
            "jbu": {"seg": {"drop-in": better, "seconds_per_image": 0.03}, "seg views": views},
        },
    }
    text = table(results)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0] == [
        "upsampler", "seg drop-in mIoU % ↑", "seg drop-in RMSE m ↓", "seg views explained variance % ↑", "seg ms/image"
    ]  # fmt: skip
    assert lines[2] == ["bilinear", "50.0", "0.250", "71.2", "2"]
    assert lines[3] == ["jbu", "52.5 ± 0.5 (+2.5 [-1.0, +4.0])", "0.125", "71.2", "30"]
    assert "- seg probe\n- seg val: 4 images\n" in text

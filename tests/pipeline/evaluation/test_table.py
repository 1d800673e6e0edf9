"""The measures of a method against the baseline, and their table."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.evaluation.results import Comparison, Resampling, compare
from pipeline.evaluation.table import table

MEASURES = {"mIoU": lambda scores: float(scores.mean()), "accuracy": lambda scores: float(scores.max())}


KEYS = ("a_0", "b_0")


def compared(**statistics: list[torch.Tensor]) -> Comparison:
    return compare(MEASURES, statistics, "bilinear", Resampling(50), KEYS)


def test_measures_are_means_over_the_probes_with_their_spread() -> None:
    ours = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0])]
    numbers = compared(bilinear=[torch.tensor([1.0, 1.0])], jbu=ours).methods["jbu"]
    assert numbers["measures"] == {"mIoU": 3.0, "accuracy": 4.5}
    assert numbers["spread"]["mIoU"] == pytest.approx(np.std([2, 4], ddof=1))
    assert numbers["difference"].keys() == {"mIoU"}, "of the first measure alone"
    difference = numbers["difference"]["mIoU"]
    assert difference["observed"] == 1.0, "of the first probes"
    assert 0 <= difference["low"] <= difference["high"] <= 2


def test_the_baseline_has_no_difference_and_one_probe_no_spread() -> None:
    numbers = compared(bilinear=[torch.tensor([1.0, 3.0])]).methods["bilinear"]
    assert numbers == {"measures": {"mIoU": 2.0, "accuracy": 3.0}, "difference": {}}


def test_without_the_baseline_the_pairs_remain() -> None:
    found = compared(jbu=[torch.tensor([1.0, 3.0])], anyup=[torch.tensor([0.5, 2.5])])
    assert found.methods["jbu"]["difference"] == {}
    assert found.pairs["jbu"]["anyup"] == pytest.approx({"observed": 0.5, "mean": 0.5, "low": 0.5, "high": 0.5})


def test_any_two_methods_are_compared_on_the_same_resamples() -> None:
    """A constant difference has no width, whatever images are hard."""
    hard = torch.tensor([1.0, 9.0])
    pairs = compared(bilinear=[torch.tensor([2.0, 2.0])], jbu=[hard + 2], anyup=[hard]).pairs
    assert pairs["jbu"]["anyup"] == pytest.approx({"observed": 2.0, "mean": 2.0, "low": 2.0, "high": 2.0})
    assert pairs["anyup"]["jbu"]["observed"] == -2.0
    assert pairs["jbu"]["bilinear"]["low"] < pairs["jbu"]["bilinear"]["high"]
    assert {name: set(others) for name, others in pairs.items()} == {
        "bilinear": {"jbu", "anyup"}, "jbu": {"bilinear", "anyup"}, "anyup": {"bilinear", "jbu"}
    }  # fmt: skip


def test_clusters_are_what_the_first_group_names() -> None:
    keys = ("0001TP_009", "Seq05VD_1", "0001TP_010", "a/Seq05VD_2")
    clusters = Resampling(5, r"([^/]+)_\d+$").clusters(keys)
    assert clusters is not None
    assert clusters.tolist() == [0, 1, 0, 1]
    assert Resampling(5).clusters(keys) is None


def test_clusters_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"finds no cluster in 1 of 2 keys, such as 'photo'"):
        Resampling(5, r"(\w+)_").clusters(("a_1", "photo"))
    with pytest.raises(ConfigError, match=r"all 2 images into the one cluster 'a', .* shorter pieces"):
        Resampling(5, r"(\w)_").clusters(("a_1", "a_2"))


def test_a_line_for_each_method_and_a_column_for_each_measure() -> None:
    drop_in: dict[str, Any] = {"measures": {"mIoU": 50.0, "RMSE": 0.25}, "difference": {}}
    better = {
        "measures": {"mIoU": 52.5, "RMSE": 0.125},
        "spread": {"mIoU": 0.5},
        "difference": {"mIoU": {"observed": 2.5, "low": -1.0, "high": 4.0}},
    }
    views = {"measures": {"explained variance": 71.25}, "difference": {}, "seconds_per_image": 1.0}
    results = {
        "config": {"backbone": "vit", "size": "32x32", "norm": "layer", "resamples": 20, "retrained": False}
        | {"cluster_by": None, "pairs": True},
        "baseline": "bilinear",
        "probes": {"seg": "seg probe"},
        "notes": ["jbu: a note"],
        "pairs": {"seg": {"drop-in": {"bilinear": {}, "jbu": {"bilinear": better["difference"]["mIoU"]}}}},
        "data": {"seg val": {"images": 4, "left out": ["k: jbu: not finite"]}},
        "methods": {
            "bilinear": {"seg": {"drop-in": drop_in, "seconds_per_image": 0.002}, "seg views": views},
            "jbu": {"seg": {"drop-in": better, "seconds_per_image": 0.03}, "seg views": views},
        },
    }
    text = table(results)
    rows, _, pairs = text.partition("\n## ")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines() if line[:1] == "|"]
    assert lines[0] == [
        "upsampler", "seg drop-in mIoU % ↑", "seg drop-in RMSE m ↓", "seg views explained variance % ↑", "seg ms/image"
    ]  # fmt: skip
    assert lines[2] == ["bilinear", "50.0", "0.250", "71.2", "2"]
    assert lines[3] == ["jbu", "52.5 ± 0.5 (+2.5 [-1.0, +4.0])", "0.125", "71.2", "30"]
    left_out = "4 images, 1 of them left out for all methods because one failed: k: jbu: not finite"
    assert f"- seg probe\n- jbu: a note\n- seg val: {left_out}\n" in text
    assert pairs.startswith("seg drop-in mIoU %: the line's upsampler less the column's\n")
    assert "| jbu | +2.5 [-1.0, +4.0] |" in pairs

"""Class activation maps of the methods: how faithful they are to the backbone's own classifier."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.evaluation.cam import class_probabilities, explain, grad_cam
from featup.evaluation.metrics import average_drop, average_increase
from pipeline.compute.device import device_of
from pipeline.config.evaluate import EvaluateConfig
from pipeline.console import report_time
from pipeline.evaluation.image_set import evenly_spaced, load_set, predict
from pipeline.evaluation.methods import Row
from pipeline.evaluation.panels import Panels
from pipeline.evaluation.table import summarise

__all__ = []


_CAM_MEASURES: Mapping[str, Callable[[Tensor], float]] = {
    "AD": lambda scores: average_drop(scores[:, 0], scores[:, 1]),
    "AI": lambda scores: average_increase(scores[:, 0], scores[:, 1]),
}


def evaluate_cam(
    config: EvaluateConfig, backbone: Backbone, rows: Sequence[Row], found: dict[str, Any], pictures: Panels
) -> None:
    """Average drop and increase of all rows, for the class the model itself predicts."""
    started = time.perf_counter()
    images = load_set(config, backbone, config.cam_shards, None, config.limit)
    found["data"]["CAM"] = images.facts
    scores, weights = [], []
    for batch in images.batches(config.batch_size):
        pixels = images.images[batch].to(device_of(backbone))
        score, classes = class_probabilities(backbone, pixels).max(1)
        scores.append(score.cpu())
        weights += grad_cam(backbone, pixels, classes)
        images.facts.setdefault("classes", []).extend(classes.tolist())
    report_time(f"CAM: {len(images)} images, decoded and through the backbone", started)
    chosen = evenly_spaced(len(images), config.pictures)
    titles = {number: f"cam_{number:05d}_{images.keys[number].replace('/', '_')}" for number in chosen}
    probabilities = torch.cat(scores)
    pictures |= {
        title: [(f"image, {probabilities[number]:.3f}", images.images[number].numpy())]
        for number, title in titles.items()
    }
    statistics = {}
    for row in rows:
        started = time.perf_counter()
        seconds = 0.0
        explained = []
        for batch in images.batches(config.batch_size):
            before = time.perf_counter()
            with torch.inference_mode():
                maps = [
                    predict(row, images, slice(one, one + 1), weights[one])[..., 0]
                    for one in range(batch.start, batch.stop)
                ]
            seconds += time.perf_counter() - before
            shown = explain(images.images[batch].to(maps[0].device), torch.cat(maps))
            classes = torch.tensor(images.facts["classes"][batch], device=shown.device)
            explained.append(class_probabilities(backbone, shown).gather(1, classes[:, None])[:, 0].cpu())
            for number in set(chosen) & set(range(batch.start, batch.stop)):
                panel = f"{row.name}, {explained[-1][number - batch.start]:.3f}"
                pictures[titles[number]].append((panel, shown[number - batch.start].cpu().numpy()))
        statistics[row.name] = torch.stack([probabilities, torch.cat(explained)], 1)
        found["rows"][row.name]["CAM"] = {
            "seconds_per_image": seconds / len(images),
            "seconds": time.perf_counter() - started,
        }
        report_time(f"CAM, {row.name}: AD {_CAM_MEASURES['AD'](statistics[row.name]):.4g}", started)
    for row in rows:
        ours, baseline = statistics[row.name], statistics[found["baseline"]]
        found["rows"][row.name]["CAM"] |= summarise(_CAM_MEASURES, [ours], [baseline], config)

"""Upsamplers compared on labelled images: the table of FeatUp (arXiv 2403.10516, section 4, table 1) for a backbone.

*Drop-in*: one linear probe is fitted on the coarse features and applied to what every row makes of them, unchanged.
*Retrained*: for every row, a probe is fitted on pixels of its own upsampled features. Class activation maps use the
backbone's own classifier, see :mod:`featup.cam`.

One process on one machine; images, labels and coarse features are held in memory. What it leaves in ``OUT``::

    OUT/table.md  OUT/table.json    the table; all numbers with config, versions and digests
    OUT/pictures/                   image, label and the rows' predictions, side by side; of activation maps what
                                    they show of the image, and the probability of its class with that alone
    OUT/plan/                       tar indices
"""

import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from featup.backbones import Backbone
from featup.evaluation.probes import Probe
from featup.multiview.back_projection import view_consistency
from featup.multiview.views import Jitter, warp
from featup.training.objective import seeded
from featup.upsamplers import ChannelMap
from pipeline.compute.device import device_of, set_threads
from pipeline.compute.models import make_backbone
from pipeline.compute.prepare import versions
from pipeline.config.base import describe
from pipeline.config.evaluate import EvaluateConfig
from pipeline.console import report_time
from pipeline.evaluation.activation_maps import evaluate_cam
from pipeline.evaluation.image_set import ImageSet, evenly_spaced, load_set, predict, seg_dtype_of
from pipeline.evaluation.methods import ImplicitRow, Row, make_rows
from pipeline.evaluation.panels import Panels, colour, sheet
from pipeline.evaluation.table import summarise, table
from pipeline.inputs import storage
from pipeline.training.probes import describe_probe
from pipeline.training.tasks import DepthTask, PixelDraw, SegmentationTask, Task, draw_rows

__all__ = ["evaluate"]


_BASELINE = "bilinear"
# Upsampled features with all their channels, at once.
_BATCH_BYTES = 1 << 27
_VIEWS_MEASURES: Mapping[str, Callable[[Tensor], float]] = {"explained": lambda shares: 100 * float(shares.mean())}
_JITTER = Jitter(max_pad=20, zoom=(1.0, 1.0))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Make the table and the pictures, and return what ``table.json`` holds.

    Raises:
        ConfigError: an unknown row, or labels that are not of the classes.
        InputError: shards that cannot be found.
        JobFailedError: too many samples cannot be decoded.
        FeatupError: a model or a checkpoint that does not fit.
    """
    threads = set_threads(config.threads, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = make_backbone(config).to(device)
    rows = make_rows(config, backbone, device)
    print(f"{backbone.extra_repr()}, {len(rows)} rows, {threads} threads on {device.type}", flush=True)
    found: dict[str, Any] = {
        "config": describe(config),
        "versions": versions(),
        "digests": {"backbone": backbone.digest, **{row.name: row.digests for row in rows if row.digests}},
        "baseline": _BASELINE if any(row.name == _BASELINE for row in rows) else rows[0].name,
        "data": {},
        "probes": {},
        "rows": {row.name: {} for row in rows},
    }
    pictures: Panels = {}
    for task, train, val in _tasks(config):
        _evaluate_task(config, backbone, rows, task, train, val, found, pictures)
    if config.cam_shards:
        evaluate_cam(config, backbone, rows, found, pictures)
    text = table(found)
    storage.write_atomic(storage.join(config.out, "table.md"), text.encode())
    storage.write_atomic(storage.join(config.out, "table.json"), json.dumps(found, indent=1).encode())
    folder = storage.join(config.out, "pictures")
    for old in storage.list_files(folder):
        # Of another run, on other images perhaps.
        if re.fullmatch(r"(seg|depth|cam)_\d{5}_.*\.png", old):
            storage.remove(storage.join(folder, old))
    for name, panels in pictures.items():
        file = io.BytesIO()
        Image.fromarray(sheet(panels)).save(file, "PNG")
        storage.write_atomic(storage.join(folder, f"{name}.png"), file.getvalue())
    print(f"\n{text}\n{len(pictures)} pictures in {folder}", flush=True)
    return found


def _tasks(config: EvaluateConfig) -> Iterator[tuple[Task, tuple[str, ...], tuple[str, ...]]]:
    if config.classes is not None:
        fill = 65535 if seg_dtype_of(config) == "uint16" else 255
        yield SegmentationTask(config.classes, config.ignore_index, fill), config.train, config.val
    if config.depth_train:
        yield DepthTask(), config.depth_train, config.depth_val


def _evaluate_task(
    config: EvaluateConfig,
    backbone: Backbone,
    rows: Sequence[Row],
    task: Task,
    train_shards: Sequence[str],
    val_shards: Sequence[str],
    found: dict[str, Any],
    pictures: Panels,
) -> None:
    """One label's numbers of all rows, into ``found`` and ``pictures``."""
    started = time.perf_counter()
    train = load_set(config, backbone, train_shards, task, config.train_limit)
    val = load_set(config, backbone, val_shards, task, config.limit)
    found["data"] |= {f"{task.kind} train": train.facts, f"{task.kind} val": val.facts}
    report_time(f"{task.kind}: {len(train)} + {len(val)} images, decoded and through the backbone", started)
    started = time.perf_counter()
    drop_in = _fit_cells(task, train, config)
    found["probes"][task.kind] = describe_probe(drop_in)
    report_time(f"{task.kind}: {describe_probe(drop_in)}", started)
    chosen = evenly_spaced(len(val), config.pictures)
    for number in chosen:
        pictures[f"{task.kind}_{number:05d}_{val.keys[number].replace('/', '_')}"] = [
            ("image", val.images[number].numpy()),
            ("label", colour(task, val.labels[number], val.labels[number])),
        ]
    titles = [name for name in pictures if name.startswith(f"{task.kind}_")]
    statistics: dict[str, dict[str, list[Tensor]]] = {}
    for row in rows:
        started = time.perf_counter()
        if isinstance(row, ImplicitRow):
            row.learn(train.features)
        probes = {"drop-in": [drop_in]}
        if config.retrained and not row.per_image:
            probes["retrained"] = _fit_pixels(task, row, train, config)
        ready = time.perf_counter()
        statistics[row.name], predictions = _predict(task, row, val, probes, chosen, config)
        for title, number, prediction in zip(titles, chosen, predictions, strict=True):
            pictures[title].append((row.name, colour(task, prediction, val.labels[number])))
        found["rows"][row.name][task.kind] = {
            "seconds_per_image": (time.perf_counter() - ready) / len(val),
            "seconds": time.perf_counter() - started,
            **{setting: {"weight_decays": [one.weight_decay for one in fits]} for setting, fits in probes.items()},
        }
        measure = next(iter(task.measures))
        report_time(
            f"{task.kind}, {row.name}: {measure} "
            + ", ".join(f"{name} {task.measures[measure](one[0]):.4g}" for name, one in statistics[row.name].items()),
            started,
        )
    if config.views:
        _evaluate_views(config, backbone, rows, val, found, f"{task.kind} views")
    for row in rows:
        for setting, ours in statistics[row.name].items():
            baseline = statistics[found["baseline"]][setting]
            found["rows"][row.name][task.kind][setting] |= summarise(task.measures, ours, baseline, config)


@torch.inference_mode()
def _evaluate_views(
    config: EvaluateConfig,
    backbone: Backbone,
    rows: Sequence[Row],
    val: ImageSet,
    found: dict[str, Any],
    part: str,
) -> None:
    """How much of the backbone's features of shifted views each row explains, for some images.

    A token of a view is the mean over its patch; nothing of that is learned, so that it is the same for all rows.
    """
    chosen = evenly_spaced(len(val), config.views_images)
    explained: dict[str, list[float]] = {row.name: [] for row in rows}
    seconds = dict.fromkeys(explained, 0.0)
    for number in chosen:
        one = slice(number, number + 1)
        # Keys below 100 belong to training.
        views = _JITTER.sample(config.views, val.size, seeded(200, number))
        normalised = backbone.normalise(val.images[one].to(device_of(backbone))).permute(0, 2, 3, 1)
        shown = warp(normalised.expand(len(views), -1, -1, -1), views, _JITTER.max_pad)
        targets = backbone.features(shown.permute(0, 3, 1, 2)).float()
        for row in rows:
            started = time.perf_counter()
            maps = predict(row, val, one, None)[0]
            seconds[row.name] += time.perf_counter() - started
            explained[row.name].append(float(view_consistency(maps, views, targets, _JITTER)))
    statistics = {name: torch.tensor(values) for name, values in explained.items()}
    found["data"][part] = {"images": len(chosen), "views": config.views}
    for row in rows:
        ours, baseline = statistics[row.name], statistics[found["baseline"]]
        numbers = summarise(_VIEWS_MEASURES, [ours], [baseline], config)
        found["rows"][row.name][part] = {"seconds_per_image": seconds[row.name] / len(chosen), **numbers}
        report_time(f"{part}, {row.name}: {_VIEWS_MEASURES['explained'](ours):.4g} %", time.perf_counter())


def _fit_cells(task: Task, train: ImageSet, config: EvaluateConfig) -> Probe:
    """The probe of coarse features."""
    grid = (train.features.shape[1], train.features.shape[2])
    targets = torch.cat([task.cells(train.labels[one], grid) for one in train.batches(config.batch_size)])
    groups = torch.arange(len(train)).repeat_interleave(grid[0] * grid[1])
    drawn = draw_rows(len(groups), config.max_vectors, 0)
    return task.fit(train.features.flatten(0, 2)[drawn], targets.flatten(0, 2)[drawn], groups[drawn])


@torch.inference_mode()
def _fit_pixels(task: Task, row: Row, train: ImageSet, config: EvaluateConfig) -> list[Probe]:
    """Probes of pixels of a row's upsampled features, one for each seed; all rows are given the same pixels."""
    pixels = max(1, min(config.pixels, config.max_vectors // len(train)))
    draws = [PixelDraw(task, pixels, seed) for seed in range(config.seeds)]
    drawn: list[list[dict[str, Tensor]]] = [[] for _ in draws]
    one_map = 4 * train.size[0] * train.size[1] * train.features.shape[-1]
    for batch in train.batches(max(1, min(config.batch_size, _BATCH_BYTES // one_map))):
        upsampled = predict(row, train, batch, None)
        for number, features, labels in zip(
            range(batch.start, batch.stop), upsampled, train.labels[batch], strict=True
        ):
            sample = {"features": features, task.kind: labels, "row": torch.tensor(number)}
            for draw, kept in zip(draws, drawn, strict=True):
                kept.append(draw(sample))
    probes = []
    for kept in drawn:
        features = torch.cat([one["features"].float().cpu() for one in kept])
        groups = torch.cat([one["row"].expand(len(one["features"])) for one in kept])
        # Autograd, which the fit uses, takes no tensors made in inference mode.
        with torch.inference_mode(False):
            targets = task.points(torch.cat([one[task.kind] for one in kept]))
            probes.append(task.fit(features.clone(), targets.clone(), groups.clone()))
    return probes


@torch.inference_mode()
def _predict(
    task: Task,
    row: Row,
    val: ImageSet,
    probes: Mapping[str, Sequence[Probe]],
    chosen: Sequence[int],
    config: EvaluateConfig,
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Statistics of every probe, all applied at once; and drop-in predictions of the chosen images, ``[H, W]``."""
    maps = [probe.channel_map for fits in probes.values() for probe in fits]
    stacked = ChannelMap(torch.cat([one.weight for one in maps]), torch.cat([one.bias for one in maps]))
    statistics: list[list[Tensor]] = [[] for _ in maps]
    shown: list[Tensor] = []
    for batch in val.batches(config.batch_size):
        outputs = predict(row, val, batch, stacked).cpu()
        for number, output in enumerate(torch.split(outputs, task.channels, -1)):
            prediction = task.decide(output)
            statistics[number].append(task.statistics(prediction, val.labels[batch]))
            if number == 0:
                shown += [prediction[one - batch.start] for one in chosen if batch.start <= one < batch.stop]
    joined = iter([torch.cat(one) for one in statistics])
    return {setting: [next(joined) for _ in fits] for setting, fits in probes.items()}, shown

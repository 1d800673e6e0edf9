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

import colorsys
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featup.backbones import Backbone
from featup.cam import class_probabilities, explain, grad_cam
from featup.metrics import average_drop, average_increase, bootstrap_difference
from featup.pictures import side_by_side
from featup.probes import Probe
from featup.training import seeded
from featup.upsamplers import ChannelMap
from featup.upsamplers.implicit import view_consistency
from featup.views import Jitter, warp
from pipeline import storage
from pipeline.config import EvaluateConfig, describe
from pipeline.decode import PreparedSample
from pipeline.errors import InputError, JobFailedError, SampleError
from pipeline.featurize import make_backbone, set_threads
from pipeline.load import image_options, load_sample
from pipeline.plan import Plan, make_plan
from pipeline.probes import DepthTask, PixelDraw, SegmentationTask, Task, describe_probe, draw_rows
from pipeline.rows import ImplicitRow, Row, make_rows
from pipeline.run import versions

__all__ = ["ImageSet", "class_colours", "evaluate", "load_set", "table"]

_BASELINE = "bilinear"
# Upsampled features with all their channels, at once.
_BATCH_BYTES = 1 << 27
_CAM_MEASURES: Mapping[str, Callable[[Tensor], float]] = {
    "AD": lambda scores: average_drop(scores[:, 0], scores[:, 1]),
    "AI": lambda scores: average_increase(scores[:, 0], scores[:, 1]),
}
_VIEWS_MEASURES: Mapping[str, Callable[[Tensor], float]] = {"explained": lambda shares: 100 * float(shares.mean())}
_JITTER = Jitter(max_pad=20, zoom=(1.0, 1.0))
_UNITS = {name: ("%", "↑") for name in ("explained", "mIoU", "accuracy", "delta 1.25", "AI")} | {
    "RMSE": ("m", "↓"),
    "AD": ("%", "↓"),
}
_INTERVAL = ("observed", "low", "high")
# In one line of a picture.
_PANELS = 5

Pixels = NDArray[np.uint8]
Panels = dict[str, list[tuple[str, Pixels]]]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images in memory.

    ``images`` uint8 ``[N, H, W, 3]``; ``features`` of the backbone, float32 ``[N, h, w, C]``; ``labels`` as the task
    prepares them, ``[N, H, W]``, empty without a task; ``keys`` ``[N]``; ``facts`` of where they come from.
    """

    images: Tensor
    features: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images and their labels."""
        return self.images.shape[1], self.images.shape[2]

    def batches(self, size: int) -> Iterator[slice]:
        """Some images at a time."""
        yield from (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))


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
        _evaluate_cam(config, backbone, rows, found, pictures)
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
        Image.fromarray(_sheet(panels)).save(file, "PNG")
        storage.write_atomic(storage.join(folder, f"{name}.png"), file.getvalue())
    print(f"\n{text}\n{len(pictures)} pictures in {folder}", flush=True)
    return found


def load_set(
    config: EvaluateConfig, backbone: Backbone, shards: Sequence[str], task: Task | None, limit: int | None
) -> ImageSet:
    """Decode images and labels, with all cores, and make their coarse features.

    Raises:
        InputError: shards that cannot be found, or hold no sample that can be used.
        JobFailedError: more samples than allowed cannot be decoded.
        ConfigError: labels that are not of the task's classes.
    """
    index_dir = storage.join(config.out, "plan", "index")
    storage.make_dirs(index_dir)
    plan = Plan(make_plan(shards, index_dir, limit), 1, index_dir)
    options = replace(
        image_options(config, backbone.mean),
        labels=() if task is None else (task.kind,),
        seg_dtype=_seg_dtype(config),
        depth_png_scale=config.depth_png_scale,
        depth_npy_scale=config.depth_npy_scale,
    )

    def load(number: int) -> tuple[str, PreparedSample | SampleError]:
        shard, position = plan.sample(number)
        index = plan.index(shard)
        try:
            return index.samples[position].key, load_sample(index, position, options)
        except SampleError as error:
            return index.samples[position].key, error

    keys, images, labels, failures = [], [], [], []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for key, sample in pool.map(load, range(plan.samples)):
            if isinstance(sample, SampleError):
                failures.append(f"{key}: {sample}")
                continue
            keys.append(key)
            images.append(torch.from_numpy(sample.image))
            if task is not None:
                labels.append(task.prepare(torch.from_numpy(sample.labels[task.kind].astype(_plain(task)))))
    if len(failures) > config.max_failed_fraction * plan.samples or not images:
        error = JobFailedError if images else InputError
        raise error(
            f"{len(failures)} of {plan.samples} samples of {list(shards)} cannot be used: {'; '.join(failures[:5])}; "
            "mend the shards, or raise max_failed_fraction"
        )
    pixels = torch.stack(images)
    with torch.inference_mode():
        maps = [backbone(batch.to(_device(backbone))).cpu() for batch in torch.split(pixels, config.batch_size)]
    facts = {"images": len(keys), "failed": failures, "faults": plan.faults, "digest": plan.digest}
    return ImageSet(pixels, torch.cat(maps), torch.stack(labels) if labels else torch.empty(0), tuple(keys), facts)


def table(found: Mapping[str, Any]) -> str:
    """The table of what :func:`evaluate` found, in Markdown, with columns that also line up as plain text."""
    # Images of later parts may have been seen before, by rows that keep what they made of them.
    timed = next(iter(next(iter(found["rows"].values()))))
    last = f"{timed} ms/image"
    columns = {"upsampler": None}
    cells: list[dict[str, str]] = []
    for row, parts in found["rows"].items():
        cells.append({"upsampler": row, last: f"{1000 * parts[timed]['seconds_per_image']:.0f}"})
        for part, setting, numbers in _parts(parts):
            for name, value in numbers["measures"].items():
                unit, better = _UNITS[name]
                title = " ".join(word for word in (part, setting, name, unit, better) if word)
                columns[title] = None
                places = 3 if unit == "m" else 1
                cells[-1][title] = f"{value:.{places}f}"
                if name in numbers.get("spread", {}):
                    cells[-1][title] += f" ± {numbers['spread'][name]:.{places}f}"
                if name in numbers["difference"]:
                    observed, low, high = (f"{numbers['difference'][name][key]:+.{places}f}" for key in _INTERVAL)
                    cells[-1][title] += f" ({observed} [{low}, {high}])"
    columns[last] = None
    widths = {name: max(len(name), *(len(one.get(name, "")) for one in cells)) for name in columns}
    config = found["config"]
    notes = []
    if found["probes"]:
        notes.append("- Drop-in: the probe of the coarse features, unchanged.")
    if found["probes"] and config["retrained"]:
        several = "; mean ± standard deviation over the probes, differences of the first" if config["seeds"] > 1 else ""
        notes.append(
            f"- Retrained: {config['seeds']} probe{'s'[: config['seeds'] > 1]} for every row, on up to "
            f"{config['pixels']} pixels of every training image's upsampled features{several}."
        )
    lines = [
        f"# {config['backbone']}, images of {config['size']}, features normalised by {config['norm']}",
        "",
        "| " + " | ".join(f"{name:{width}}" for name, width in widths.items()) + " |",
        "| " + " | ".join("-" * (width - 1) + ("-", ":")[name != "upsampler"] for name, width in widths.items()) + " |",
        *("| " + " | ".join(f"{one.get(name, ''):{width}}" for name, width in widths.items()) + " |" for one in cells),
        "",
        f"- ↑ more is better, ↓ less is better. In brackets: difference to {found['baseline']}, and its 95% interval "
        f"over {config['resamples']} bootstraps of the images.",
        *notes,
        f"- {last}: upsampling with all probes applied at once, and counting; without fitting probes.",
        *(f"- {text}" for text in found["probes"].values()),
        *(f"- {name}: {data['images']} images" for name, data in found["data"].items()),
    ]
    return "\n".join(lines) + "\n"


def class_colours(ids: Tensor, classes: int) -> Pixels:
    """Class ids ``[H, W]`` as uint8 ``[H, W, 3]``: a colour for each, black for ids that are no class."""
    # The golden ratio spreads the hues of any number of classes.
    palette = [
        colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.9, 0.5)[k % 2], (1.0, 0.75)[k // 2 % 2]) for k in range(classes)
    ]
    colours = (np.array([*palette, (0, 0, 0)]) * 255).round().astype(np.uint8)
    numbers = ids.numpy()
    picked: Pixels = colours[np.where((numbers >= 0) & (numbers < classes), numbers, classes)]
    return picked


def _parts(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for part, numbers in parts.items():
        if "measures" in numbers:
            yield part, "", numbers
        for setting in ("drop-in", "retrained"):
            if setting in numbers:
                yield part, setting, numbers[setting]


def _tasks(config: EvaluateConfig) -> Iterator[tuple[Task, tuple[str, ...], tuple[str, ...]]]:
    if config.classes is not None:
        fill = 65535 if _seg_dtype(config) == "uint16" else 255
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
    _tell(f"{task.kind}: {len(train)} + {len(val)} images, decoded and through the backbone", started)
    started = time.perf_counter()
    drop_in = _fit_cells(task, train, config)
    found["probes"][task.kind] = describe_probe(drop_in)
    _tell(f"{task.kind}: {describe_probe(drop_in)}", started)
    chosen = _evenly(len(val), config.pictures)
    for number in chosen:
        pictures[f"{task.kind}_{number:05d}_{val.keys[number].replace('/', '_')}"] = [
            ("image", val.images[number].numpy()),
            ("label", _coloured(task, val.labels[number], val.labels[number])),
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
            pictures[title].append((row.name, _coloured(task, prediction, val.labels[number])))
        found["rows"][row.name][task.kind] = {
            "seconds_per_image": (time.perf_counter() - ready) / len(val),
            "seconds": time.perf_counter() - started,
            **{setting: {"weight_decays": [one.weight_decay for one in fits]} for setting, fits in probes.items()},
        }
        measure = next(iter(task.measures))
        _tell(
            f"{task.kind}, {row.name}: {measure} "
            + ", ".join(f"{name} {task.measures[measure](one[0]):.4g}" for name, one in statistics[row.name].items()),
            started,
        )
    if config.views:
        _evaluate_views(config, backbone, rows, val, found, f"{task.kind} views")
    for row in rows:
        for setting, ours in statistics[row.name].items():
            baseline = statistics[found["baseline"]][setting]
            found["rows"][row.name][task.kind][setting] |= _numbers(task.measures, ours, baseline, config)


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
    chosen = _evenly(len(val), config.views_images)
    explained: dict[str, list[float]] = {row.name: [] for row in rows}
    seconds = dict.fromkeys(explained, 0.0)
    for number in chosen:
        one = slice(number, number + 1)
        # Keys below 100 belong to training.
        views = _JITTER.sample(config.views, val.size, seeded(200, number))
        normalised = backbone.normalise(val.images[one].to(_device(backbone))).permute(0, 2, 3, 1)
        shown = warp(normalised.expand(len(views), -1, -1, -1), views, _JITTER.max_pad)
        targets = backbone.features(shown.permute(0, 3, 1, 2)).float()
        for row in rows:
            started = time.perf_counter()
            maps = _predicted(row, val, one, None)[0]
            seconds[row.name] += time.perf_counter() - started
            explained[row.name].append(float(view_consistency(maps, views, targets, _JITTER)))
    statistics = {name: torch.tensor(values) for name, values in explained.items()}
    found["data"][part] = {"images": len(chosen), "views": config.views}
    for row in rows:
        ours, baseline = statistics[row.name], statistics[found["baseline"]]
        numbers = _numbers(_VIEWS_MEASURES, [ours], [baseline], config)
        found["rows"][row.name][part] = {"seconds_per_image": seconds[row.name] / len(chosen), **numbers}
        _tell(f"{part}, {row.name}: {_VIEWS_MEASURES['explained'](ours):.4g} %", time.perf_counter())


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
        upsampled = _predicted(row, train, batch, None)
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
        outputs = _predicted(row, val, batch, stacked).cpu()
        for number, output in enumerate(torch.split(outputs, task.channels, -1)):
            prediction = task.decide(output)
            statistics[number].append(task.statistics(prediction, val.labels[batch]))
            if number == 0:
                shown += [prediction[one - batch.start] for one in chosen if batch.start <= one < batch.stop]
    joined = iter([torch.cat(one) for one in statistics])
    return {setting: [next(joined) for _ in fits] for setting, fits in probes.items()}, shown


def _evaluate_cam(
    config: EvaluateConfig, backbone: Backbone, rows: Sequence[Row], found: dict[str, Any], pictures: Panels
) -> None:
    """Average drop and increase of all rows, for the class the model itself predicts."""
    started = time.perf_counter()
    images = load_set(config, backbone, config.cam_shards, None, config.limit)
    found["data"]["CAM"] = images.facts
    scores, weights = [], []
    for batch in images.batches(config.batch_size):
        pixels = images.images[batch].to(_device(backbone))
        score, classes = class_probabilities(backbone, pixels).max(1)
        scores.append(score.cpu())
        weights += grad_cam(backbone, pixels, classes)
        images.facts.setdefault("classes", []).extend(classes.tolist())
    _tell(f"CAM: {len(images)} images, decoded and through the backbone", started)
    chosen = _evenly(len(images), config.pictures)
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
                    _predicted(row, images, slice(one, one + 1), weights[one])[..., 0]
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
        _tell(f"CAM, {row.name}: AD {_CAM_MEASURES['AD'](statistics[row.name]):.4g}", started)
    for row in rows:
        ours, baseline = statistics[row.name], statistics[found["baseline"]]
        found["rows"][row.name]["CAM"] |= _numbers(_CAM_MEASURES, [ours], [baseline], config)


def _numbers(
    measures: Mapping[str, Callable[[Tensor], float]],
    ours: Sequence[Tensor],
    baseline: Sequence[Tensor],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Means over probes, their spread where there are several, and the difference to the baseline's first probe."""
    values = {name: [measure(one) for one in ours] for name, measure in measures.items()}
    compared = next(iter(measures))
    numbers: dict[str, Any] = {
        "measures": {name: float(np.mean(one)) for name, one in values.items()},
        "difference": {},
    }
    if len(ours) > 1:
        numbers["spread"] = {name: float(np.std(one, ddof=1)) for name, one in values.items()}
    if ours[0] is not baseline[0]:
        interval = bootstrap_difference(measures[compared], ours[0], baseline[0], config.resamples)
        observed = measures[compared](ours[0]) - measures[compared](baseline[0])
        numbers["difference"][compared] = {"observed": observed, **asdict(interval)}
    return numbers


def _predicted(row: Row, images: ImageSet, batch: slice, projection: ChannelMap | None) -> Tensor:
    """A row's result for some images, at their own size, where the row makes it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, features = images.images[batch].to(device), images.features[batch].to(device)
    return row.predict(pixels, features, projection, images.size)


def _coloured(task: Task, values: Tensor, label: Tensor) -> Pixels:
    """A prediction or a label ``[H, W]`` as colours; depths on the scale of the image's label."""
    if isinstance(task, SegmentationTask):
        return class_colours(values, task.classes)
    known = label[task.known(label)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    scaled = ((values - low) / max(high - low, 1e-6)).clamp(0, 1)
    colours = matplotlib.colormaps["viridis"](scaled.nan_to_num(0).numpy())[..., :3]
    colours[~values.isfinite().numpy()] = 0
    shown: Pixels = (colours * 255).round().astype(np.uint8)
    return shown


def _sheet(panels: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Panels in lines of about the same length, as many as are needed."""
    each = math.ceil(len(panels) / math.ceil(len(panels) / _PANELS))
    lines = [side_by_side(panels[at : at + each]) for at in range(0, len(panels), each)]
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return np.concatenate(padded)


def _evenly(count: int, wanted: int) -> list[int]:
    """Numbers of at most ``wanted`` images, spread over the set."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, wanted))})


def _seg_dtype(config: EvaluateConfig) -> Any:
    return "uint16" if max(config.classes or 0, config.ignore_index) > 255 else "uint8"


def _plain(task: Task) -> Any:
    """The NumPy type that torch has for a label."""
    return np.int32 if task.kind == "seg" else np.float32


def _device(backbone: Backbone) -> torch.device:
    return next(backbone.parameters()).device


def _tell(text: str, started: float) -> None:
    print(f"{text} ({time.perf_counter() - started:.1f} s)", flush=True)

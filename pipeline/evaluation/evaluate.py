"""Upsamplers compared on labelled images: the table of FeatUp (arXiv 2403.10516, section 4, table 1) for a backbone.

One process on one machine; images, labels and coarse features are held in memory. An evaluation leaves in ``OUT``::

    OUT/table.md  OUT/table.json    the table; all numbers with config, versions and digests
    OUT/pictures/                   image, label and the methods' predictions, side by side; of activation maps what
                                    they leave of the image, and the probability of its class with that alone
    OUT/plan/                       tar indices
"""

import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from featup.backbones import Backbone
from featup.evaluation.pixel_probe import PixelProbeRecipe
from pipeline.compute.device import choose_device, set_threads
from pipeline.compute.models import make_backbone
from pipeline.compute.prepare import versions
from pipeline.config.base import describe
from pipeline.config.evaluate import EvaluateConfig
from pipeline.console import report_time
from pipeline.evaluation.activation_maps import evaluate_activation_maps
from pipeline.evaluation.image_set import ImageSet, flip_set, load_set, seg_dtype
from pipeline.evaluation.label_maps import evaluate_labels
from pipeline.evaluation.methods import Method, create_methods
from pipeline.evaluation.panels import Panels, sheet
from pipeline.evaluation.protocol_448 import Protocol448
from pipeline.evaluation.results import Part
from pipeline.evaluation.table import table
from pipeline.evaluation.trained_on import training_notes
from pipeline.evaluation.views import evaluate_views
from pipeline.inputs import storage
from pipeline.training.tasks import DepthTask, SegmentationTask, Task

__all__ = ["evaluate"]


_BASELINE = "bilinear"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Write the table and the pictures, and return the content of ``table.json``.

    Raises:
        ConfigError: labels that are not of the classes.
        InputError: shards that cannot be found.
        JobFailedError: too many samples cannot be decoded.
        FeatupError: a model or a checkpoint that does not fit.
    """
    threads = set_threads(config.threads, 1)
    device = choose_device(None)
    backbone = make_backbone(config).to(device)
    methods = create_methods(config, backbone, device)
    names = [method.name for method in methods]
    print(f"{backbone.extra_repr()}, {len(methods)} methods, {threads} threads on {device.type}", flush=True)
    baseline = _BASELINE if _BASELINE in names else names[0]
    parts = list(_parts(config, backbone, methods, baseline))
    data = {name: facts for part in parts for name, facts in part.data.items()}
    notes = [note for part in parts for note in part.notes]
    results = {
        "config": describe(config),
        "versions": versions(),
        "digests": {"backbone": backbone.digest} | {each.name: each.digests for each in methods if each.digests},
        "baseline": baseline,
        "data": data,
        "probes": {part.name: part.probe for part in parts if part.probe},
        "notes": [*notes, *training_notes(config, methods, data)],
        "pairs": {part.name: part.pairs for part in parts},
        "methods": {name: {part.name: part.methods[name] for part in parts} for name in names},
    }
    text = table(results)
    storage.write_atomic(storage.join(config.out, "table.md"), text.encode())
    storage.write_atomic(storage.join(config.out, "table.json"), json.dumps(results, indent=1).encode())
    folder = storage.join(config.out, "pictures")
    pictures = {name: panels for part in parts for name, panels in part.pictures.items()}
    _write_pictures(folder, pictures)
    print(f"\n{text}\n{len(pictures)} pictures in {folder}", flush=True)
    return results


def _parts(config: EvaluateConfig, backbone: Backbone, methods: Sequence[Method], baseline: str) -> Iterator[Part]:
    """The results of every part that the options ask for."""
    for task, train_shards, val_shards in _tasks(config):
        started = time.perf_counter()
        train = load_set(config, backbone, train_shards, task, config.train_limit)
        val = load_set(config, backbone, val_shards, task, config.limit)
        _report_images(task.kind, started, train, val)
        protocol = None
        if config.protocol == "448" and isinstance(task, SegmentationTask):
            recipe = PixelProbeRecipe(epochs=config.epochs)
            protocol = Protocol448(task, train, flip_set(config, backbone, train), recipe)
        yield evaluate_labels(config, methods, baseline, task, train, val, protocol)
        if config.views:
            yield evaluate_views(config, backbone, methods, baseline, val, f"{task.kind} views")
    if config.cam_shards:
        started = time.perf_counter()
        images = load_set(config, backbone, config.cam_shards, None, config.limit)
        _report_images("CAM", started, images)
        yield evaluate_activation_maps(config, backbone, methods, baseline, images)


def _tasks(config: EvaluateConfig) -> Iterator[tuple[Task, tuple[str, ...], tuple[str, ...]]]:
    """Each label's task, with the shards to fit and to evaluate its probes on."""
    if config.classes is not None:
        fill = 65535 if seg_dtype(config) == "uint16" else 255
        yield SegmentationTask(config.classes, config.ignore_index, fill), config.train, config.val
    if config.depth_train:
        yield DepthTask(), config.depth_train, config.depth_val


def _report_images(part: str, started: float, *sets: ImageSet) -> None:
    counts = " + ".join(str(len(images)) for images in sets)
    report_time(f"{part}: {counts} images, decoded and through the backbone", started)


def _write_pictures(folder: str, pictures: Panels) -> None:
    """Write all pictures; those of an earlier run, on other images perhaps, are removed."""
    for old in storage.list_files(folder):
        if re.fullmatch(r"(seg|depth|cam)_\d{5}_.*\.png", old):
            storage.remove(storage.join(folder, old))
    for name, panels in pictures.items():
        file = io.BytesIO()
        Image.fromarray(sheet(panels)).save(file, "PNG")
        storage.write_atomic(storage.join(folder, f"{name}.png"), file.getvalue())

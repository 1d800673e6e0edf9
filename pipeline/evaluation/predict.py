"""A probe applied to photographs. A prediction leaves in ``OUT``::

OUT/seg/NAME.png        class ids at the photograph's own size, as displayed, in the classes' colours
OUT/depth/NAME.png      depth in millimetres, 16 bit; NAME.npy: in metres
OUT/overlays/NAME.jpg   the prediction's colours over the photograph
OUT/contact_sheet.png   some of the images with prediction and, where shards have one, label
OUT/predictions.json    every image with its status and reason; config, versions and digests
OUT/plan/               tar indices
"""

import json
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featup.pictures import side_by_side
from pipeline.compute.device import set_threads
from pipeline.compute.prepare import versions
from pipeline.config.base import describe
from pipeline.config.predict import PredictConfig
from pipeline.decode.members import select_members
from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import PreparedSample
from pipeline.decode.worker import DecoderProcess
from pipeline.errors import ConfigError, JobFailedError, Reason, SampleError
from pipeline.evaluation import prediction_files as files
from pipeline.evaluation.image_set import evenly_spaced
from pipeline.evaluation.panels import Pixels, colour, contact_sheet, thumbnail
from pipeline.evaluation.photographs import Photograph, find_photographs
from pipeline.evaluation.predictor import Predictor, decide_at_source, load_predictor
from pipeline.inputs import storage
from pipeline.inputs.read import Sample
from pipeline.progress import CountProgress
from pipeline.training.class_names import class_names, class_palette
from pipeline.training.tasks import SegmentationTask

__all__ = ["predict"]


_LISTED = 20


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A photograph's bytes, and its image at the backbone's size."""

    members: Sample
    sample: PreparedSample


def predict(config: PredictConfig) -> dict[str, Any]:
    """Write predictions and pictures, print the account, and return the content of ``predictions.json``.

    Raises:
        InputError: photographs that cannot be found.
        ConfigError, WeightsError, StoreFormatError: see :func:`pipeline.evaluation.predictor.load_predictor`.
        JobFailedError: more images failed than allowed; the others are predicted.
    """
    set_threads(config.threads, 1)
    predictor = load_predictor(config.probe, weights=config.weights, checkpoint=config.checkpoint, names=config.names)
    limits = {name: getattr(config, name) for name in ("max_pixels", "max_bytes", "decode_timeout")}
    options = replace(predictor.options, **limits)
    photographs = find_photographs(config, options, predictor.task.kind)
    for remark in photographs.remarks:
        print(remark, flush=True)
    print(f"{photographs.count} images: {predictor}", flush=True)
    shown = set(evenly_spaced(photographs.count, config.sheet_images))
    records: list[dict[str, Any]] = []
    with (
        closing(DecoderProcess()) as decoder,
        closing(_computed(photographs.each, predictor, options, decoder, config.batch_size)) as computed,
        CountProgress(photographs.count, "images") as progress,
    ):
        output = _Output(config, predictor, options, decoder)
        failed = 0
        for photograph, loaded, result in computed:
            record: dict[str, Any] = {"name": photograph.name, "place": photograph.place, "status": "ok"}
            try:
                if isinstance(loaded, SampleError):
                    raise loaded
                assert result is not None
                record["size"] = list(loaded.sample.transform.source_size)
                record |= output.write(photograph.name, loaded, result, len(records) in shown)
            except SampleError as error:
                record |= {"status": "failed", "reason": error.reason.value, "detail": error.detail}
                failed += 1
            records.append(record)
            progress.reach(len(records), f"{failed} failed")
    return _conclude(config, predictor, output, records)


def _computed(
    photographs: Iterator[Photograph],
    predictor: Predictor,
    options: DecodeOptions,
    decoder: DecoderProcess,
    batch_size: int,
) -> Generator[tuple[Photograph, _Loaded | SampleError, Tensor | None]]:
    """Every photograph in order with the probe's output; the next batch is decoded while one is computed."""

    def load(photograph: Photograph) -> _Loaded | SampleError:
        try:
            members = photograph.read()
            return _Loaded(members, decoder.prepare(members, options))
        except SampleError as error:
            return error

    def load_batch() -> list[tuple[Photograph, _Loaded | SampleError]]:
        return [(photograph, load(photograph)) for photograph in islice(photographs, batch_size)]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load_batch)
        while batch := coming.result():
            coming = pool.submit(load_batch)
            images = [loaded.sample.image for _, loaded in batch if isinstance(loaded, _Loaded)]
            outputs = iter(predictor.outputs(torch.from_numpy(np.stack(images))) if images else ())
            for photograph, loaded in batch:
                yield photograph, loaded, None if isinstance(loaded, SampleError) else next(outputs)


class _Output:
    """Writes what is predicted, and gathers the contact sheet and the comparison with labels."""

    def __init__(
        self, config: PredictConfig, predictor: Predictor, options: DecodeOptions, decoder: DecoderProcess
    ) -> None:
        self.predictor, self.options, self.decoder = predictor, options, decoder
        self.task = predictor.task
        self.folder = config.out
        self.colours = class_palette(self.task.channels, predictor.classes)
        self.strips: list[Pixels] = []
        self.shown_classes: set[int] = set()
        self.statistics: list[Tensor] = []

    def write(self, name: str, loaded: _Loaded, output: Tensor, shown: bool) -> dict[str, Any]:
        """Write one photograph's files.

        Returns:
            What is worth noting of it.

        Raises:
            SampleError: the photograph cannot be decoded at its own size, or the probe's output is not finite.
        """
        if not output.isfinite().all():
            raise SampleError(Reason.NOT_FINITE, "the probe's output holds values that are not finite")
        transform = loaded.sample.transform
        # At its own size the photograph is decoded again, one at a time: a batch of large ones may not fit in memory.
        own = replace(self.options, size=transform.source_size, label_size=None, geometry="squash")
        photograph, label, note = self._decode(loaded.members, own)
        prediction = decide_at_source(self.task, output, transform)
        predicted = self.task.known(prediction)
        pixels = colour(self.task, prediction, prediction if label is None else label, self.predictor.classes)
        if self.task.kind == "seg":
            self._write(f"seg/{name}.png", files.seg_png(prediction.numpy(), self.colours))
        else:
            self._write(f"depth/{name}.png", files.depth_png(prediction.numpy()))
            self._write(f"depth/{name}.npy", files.depth_npy(prediction.numpy()))
        self._write(f"overlays/{name}.jpg", files.overlay_jpeg(photograph, pixels, predicted.numpy()))
        panels = [(name.rpartition("/")[2], thumbnail(photograph)), (self._title(prediction), pixels)]
        if label is not None:
            compared = label.masked_fill(~predicted, -1 if self.task.kind == "seg" else torch.nan)
            self.statistics.append(self.task.statistics(prediction[None], compared[None]))
            panels.append(("label", colour(self.task, label, label, self.predictor.classes)))
        if shown:
            self.strips.append(side_by_side(panels, 200))
            if self.task.kind == "seg":
                for ids in (prediction, label):
                    self.shown_classes.update([] if ids is None else torch.unique(ids).tolist())
        return {"label": note} if note else {}

    def _decode(self, members: Sample, own: DecodeOptions) -> tuple[Pixels, Tensor | None, str]:
        """The photograph and, where it has one, its label ``[h, w]``, both at its own size.

        A label that cannot be used costs no prediction: the text says why not.
        """
        kind, note = self.task.kind, ""
        wide = isinstance(self.task, SegmentationTask) and self.task.fill > 255
        labelled = replace(own, labels=(kind,), seg_dtype="uint16" if wide else "uint8")
        if kind in select_members(members, labelled):
            try:
                sample = self.decoder.prepare(members, labelled)
                # PyTorch has no uint16 to compute with.
                values = sample.labels[kind].astype(np.int32 if kind == "seg" else np.float32)
                return sample.image, self.task.prepare(torch.from_numpy(values)), ""
            except (SampleError, ConfigError) as error:
                note = f"not used: {error}"
        return self.decoder.prepare(members, own).image, None, note

    def _title(self, prediction: Tensor) -> str:
        known = prediction[self.task.known(prediction)]
        if self.task.kind == "seg" or not len(known):
            return "prediction"
        return f"{known.min():.2f} to {known.max():.2f} m"

    def _write(self, name: str, data: bytes) -> None:
        storage.write_atomic(storage.join(self.folder, name), data)

    def sheet(self) -> Pixels:
        """The contact sheet, with the names of its classes."""
        names = class_names(self.predictor.classes, self.task.channels)
        legend = [(names[number], self.colours[number]) for number in sorted(self.shown_classes) if number >= 0]
        return contact_sheet(self.strips, legend)

    def measures(self) -> dict[str, float]:
        """Over all photographs with labels; none where there are none."""
        if not self.statistics:
            return {}
        joined = torch.cat(self.statistics)
        return {name: measure(joined) for name, measure in self.task.measures.items()}


def _conclude(
    config: PredictConfig, predictor: Predictor, output: _Output, records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write the contact sheet and the list, print the account, and fail where too many images did."""
    failed = [record for record in records if record["status"] == "failed"]
    notes = [record for record in records if "label" in record]
    measures = output.measures()
    results = {
        "config": describe(config),
        "versions": versions(),
        "digests": predictor.digests,
        "classes": list(predictor.classes),
        "measures": measures,
        "images": list(records),
    }
    place = storage.join(config.out, "predictions.json")
    storage.write_atomic(place, json.dumps(results, indent=1).encode())
    if output.strips:
        storage.write_atomic(storage.join(config.out, "contact_sheet.png"), files.png(output.sheet()))
        print(f"{len(output.strips)} images in {storage.join(config.out, 'contact_sheet.png')}")
    if measures:
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in measures.items())
        print(f"against the labels of {len(output.statistics)} images: {numbers}")
    lines = [f"label of {record['place']} {record['label']}" for record in notes[:_LISTED]]
    lines += [f"failed: {record['place']}: {record['reason']}: {record['detail']}" for record in failed[:_LISTED]]
    hidden = max(0, len(notes) - _LISTED) + max(0, len(failed) - _LISTED)
    if hidden:
        lines.append(f"and {hidden} more, in {place}")
    lines.append(f"input {len(records)} = ok {len(records) - len(failed)} + failed {len(failed)}")
    print("\n".join(lines), flush=True)
    fraction = len(failed) / max(1, len(records))
    if fraction > config.max_failed_fraction:
        raise JobFailedError(
            f"{len(failed)} of {len(records)} images failed ({fraction:.2%}), more than "
            f"max_failed_fraction={config.max_failed_fraction:.2%}; the others are predicted. Look at the reasons "
            f"above and in {place}, then mend the images or raise the limit"
        )
    return results

"""The featurizing stage: the actor that extracts, upsamples, encodes and writes, and returns receipts only."""

import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featup.backbones import Backbone, create_backbone
from featup.checkpoints import check_backbone, load_pca
from featup.errors import FeatupError, GeometryError
from featup.inference import resize_images
from featup.projection import PCA, PCAFit
from featup.upsamplers import ChannelMap, Upsampler, create_upsampler
from featup.upsamplers.implicit import Fit, FitOptions, Implicit
from featup.weights import file_digest
from pipeline import storage
from pipeline.config import BackboneConfig, PrecomputeConfig
from pipeline.errors import ConfigError, PipelineError, Reason, SampleError, StoreError
from pipeline.ledger import Ledger, Receipt, SampleRecord
from pipeline.load import LoadedUnit, decode_options, failed_unit, load_sample, unpack
from pipeline.plan import Plan, UnitKey
from pipeline.store import (
    FAILED,
    NOTHING,
    OK,
    Layout,
    StoreWriter,
    feature_space,
    list_differences,
    round_mantissa,
    row_checksum,
    stored_config,
)

__all__ = [
    "Extractor",
    "Featurizer",
    "Setup",
    "UnitProcessor",
    "fit_pca",
    "make_backbone",
    "pca_place",
    "set_threads",
    "take_pca",
]


@dataclass(frozen=True)
class Setup:
    """What is known of the models before the first unit, and must be the same in every actor.

    ``grid`` is the (height, width) of the coarse features; ``digests`` name the weights, the checkpoint and the PCA.
    """

    channels: int
    grid: tuple[int, int]
    stride: tuple[int, int]
    layer: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digests: dict[str, str]
    device: str

    def with_pca(self, pca: PCA, data: bytes) -> "Setup":
        """The same with a PCA, ``data`` as a file, whose components are the channels."""
        digests = self.digests | {"pca": hashlib.sha256(data).hexdigest()}
        return replace(self, channels=len(pca.components), digests=digests)


def set_threads(count: int | None, actors: int) -> int:
    """Use ``count`` threads in this process, by default the machine's cores shared among the actors."""
    # Ray sets OMP_NUM_THREADS to the cores it reserved, which on a machine of its own leaves the others idle.
    threads = count or max(1, len(os.sched_getaffinity(0)) // actors)
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return threads


def make_backbone(config: BackboneConfig) -> Backbone:
    """The backbone that the options name, on the CPU.

    Raises:
        FeatupError: a model, layer, size or weights that do not fit.
    """
    return create_backbone(
        config.backbone,
        weights=storage.local_copy(config.weights) if config.weights else None,
        pretrained=config.pretrained and config.weights is None,
        layer=config.layer,
        stride=config.stride,
        norm=config.norm,
        image_size=config.size,
        kwargs=config.backbone_kwargs,
        mean=config.mean,
        std=config.std,
    )


class Extractor:
    """Backbone, upsampler and projection of one config on one device."""

    def __init__(self, config: PrecomputeConfig, pca: PCA | None = None) -> None:
        """
        Raises:
            FeatupError: a model, layer, size or checkpoint that does not fit.
        """
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone: Backbone = make_backbone(config).to(self.device)
        self.grid = self.backbone.grid(config.size)
        checkpoint = storage.local_copy(config.checkpoint) if config.checkpoint else None
        # Of implicit fitting this is what a fit starts from.
        name = config.fit_base if config.upsampler == "implicit" else config.upsampler
        self.upsampler: Upsampler = create_upsampler(
            name,
            channels=self.backbone.channels,
            checkpoint=checkpoint,
            sigma_space=config.sigma_space,
            sigma_colour=config.sigma_colour,
        ).to(self.device)
        self.digests = {"backbone": self.backbone.digest}
        if checkpoint:
            check_backbone(checkpoint, self.backbone)
            self.digests["checkpoint"] = file_digest(checkpoint)
        largest, target = self.upsampler.largest(self.grid), config.target_size
        if largest and config.upsampler != "implicit" and (target.height > largest[0] or target.width > largest[1]):
            raise GeometryError(
                f"{config.upsampler} brings {self.grid[0]}x{self.grid[1]} to at most {largest[0]}x{largest[1]} and "
                f"output_size is {target}; ask for less, or train a deeper stack"
            )
        self.projection: ChannelMap | None = None
        self.channels = self.backbone.channels
        if pca is not None:
            self.project(pca)

    def project(self, pca: PCA) -> None:
        """From now on give principal components in place of the channels."""
        self.projection = pca.as_channel_map()
        self.channels = len(pca.components)
        if self.config.upsampler == "implicit":
            options = FitOptions(steps=self.config.fit_steps, views=self.config.fit_views, seed=self.config.fit_seed)
            self.upsampler = Implicit(self.backbone, pca, self.upsampler, options, self.config.size)

    def setup(self) -> Setup:
        """The facts every actor must agree on."""
        return Setup(
            channels=self.channels,
            grid=self.grid,
            stride=self.backbone.stride,
            layer=self.backbone.layer,
            mean=self.backbone.mean,
            std=self.backbone.std,
            digests=self.digests,
            device=torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"cpu ({platform.processor() or platform.machine()})",
        )

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Images uint8 ``[B, H, W, 3]`` to coarse features float32 ``[B, h, w, C]``."""
        images = resize_images(images.to(self.device), self.config.size)
        dtype = getattr(torch, self.config.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            features: Tensor = self.backbone(images)
        return features.float()

    @torch.inference_mode()
    def upsample(self, features: Tensor, images: Tensor, out: Tensor) -> list[Fit]:
        """Coarse features and their images into ``out`` float16 ``[B, H', W', K]``, projected.

        Returns:
            The images' fits where they are fitted, else nothing.
        """
        self.upsampler(features, images.to(self.device), self.config.target_size, self.projection, out)
        return self.upsampler.fits if isinstance(self.upsampler, Implicit) else []


def fit_pca(extractor: Extractor, plan: Plan, components: int, images: int) -> PCA:
    """Fit a PCA on the coarse features of ``images`` samples spread evenly over the data set.

    Upsampled features are means of coarse ones, so these are the ones to fit on. The samples follow from the plan
    alone, so the fit is the same in every run.

    Raises:
        ConfigError: not one of the samples can be decoded.
        GeometryError: more components than channels or vectors.
    """
    options = decode_options(extractor.config, extractor.backbone.mean)
    options = replace(options, labels=())
    fit = PCAFit(extractor.backbone.channels)
    count = min(images, plan.samples)
    problems: list[str] = []
    batch: list[NDArray[np.uint8]] = []
    for number in range(count):
        shard, position = plan.sample(int((number + 0.5) * plan.samples / count))
        try:
            batch.append(load_sample(plan.index(shard), position, options).image)
        except SampleError as error:
            problems.append(str(error))
        if batch and (len(batch) == extractor.config.batch_size or number == count - 1):
            fit.add(extractor.features(torch.from_numpy(np.stack(batch))))
            batch = []
    if not fit.count:
        raise ConfigError(
            f"not one of the {count} samples the PCA is fitted on can be decoded: {problems[0]}; look at the shards"
        )
    return fit.solve(components)


class UnitProcessor:
    """Turns loaded units into features and writes them; safe to call from two threads.

    Computing and writing each have a lock of their own: while one thread writes a unit, the other computes the next.
    """

    def __init__(self, config: PrecomputeConfig, setup: Setup, layout: Layout, plan_digest: str) -> None:
        """
        Raises:
            StoreError: the weights this process found are not those the store was made for, or there is no store.
        """
        self.config = config
        self.layout = layout
        self.plan_digest = plan_digest
        self.threads = set_threads(config.threads, config.actors)
        pca, pca_digest = None, {}
        if config.projects:
            path = storage.local_copy(pca_place(config.out))
            pca, pca_digest = load_pca(path), {"pca": file_digest(path)}
        self.extractor = Extractor(config, pca)
        digests = self.extractor.digests | pca_digest
        if digests != setup.digests:
            raise StoreError(
                f"the models on {platform.node()} are {digests}, the store was made for {setup.digests}; "
                "give every node the same weight files"
            )
        self.writer = StoreWriter(config.out, layout, self.threads)
        self.ledger = Ledger(storage.join(config.out, "ledger"))
        self._computing, self._writing = threading.Lock(), threading.Lock()
        # Blocks to use again: memory fresh from the system costs a page fault every 4 KiB, a tenth of the time here.
        self._spare: list[NDArray[np.float16]] = []

    def process(self, key: UnitKey, loaded: LoadedUnit) -> Receipt:
        """Features, data, receipt, in that order. A unit that is done already is left alone.

        Returns the receipt, or, where every attempt failed, a receipt with ``error`` that is not in the ledger.
        """
        done = self.ledger.get(key, self.plan_digest)
        if done is not None:
            return done
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._process(key, loaded)
            except (FeatupError, PipelineError, OSError, RuntimeError, ValueError) as error:
                # Anything else is a fault of this program and ends the job with its traceback.
                if attempt == self.config.unit_attempts:
                    return failed_unit(key, self.plan_digest, loaded.records, error)

    def _process(self, key: UnitKey, loaded: LoadedUnit) -> Receipt:
        seconds, sizes = dict(loaded.seconds), dict(loaded.sizes)
        with self._computing:
            features, records = self.compute(loaded, seconds)
        good = [offset for offset, record in enumerate(records) if record.status == "ok"]
        status = np.full(self.layout.rows_per_shard, NOTHING, np.uint8)
        status[: len(records)] = FAILED
        status[good] = OK
        blocks = {**loaded.blocks, "features": features, "status": status}
        del blocks["image"]
        for spec in self.layout.arrays[:-1]:
            blocks[spec.name][status != OK] = spec.fill
        with self._writing:
            with _timed(seconds, "encode_write"):
                sizes["stored"] = self.writer.write(key, blocks)
                sizes["encode_write"] = len(good) * self.layout.sample_bytes
            with _timed(seconds, "checksum"):
                checksums = {
                    spec.name: [
                        row_checksum(blocks[spec.name][offset]) if status[offset] == OK else None
                        for offset in range(len(records))
                    ]
                    for spec in self.layout.arrays
                }
            receipt = Receipt(
                unit=key,
                plan=self.plan_digest,
                samples=records,
                checksums=checksums,
                seconds=seconds,
                sizes=sizes,
                worker={"host": platform.node(), "pid": os.getpid(), "threads": self.threads},
            )
            self.ledger.commit(receipt)
        self._spare.append(features)
        return receipt

    def compute(
        self, loaded: LoadedUnit, seconds: dict[str, float]
    ) -> tuple[NDArray[np.float16], tuple[SampleRecord, ...]]:
        """Features float16 ``[R, H', W', K]`` of a unit and its records; ``seconds`` of each stage are added to.

        Rows that hold no good sample are left as they are.
        """
        layout = self.layout
        records = list(loaded.records)
        good = [offset for offset, record in enumerate(records) if record.status == "ok"]
        shape = (layout.rows_per_shard, layout.height, layout.width, layout.channels)
        block = self._spare.pop() if self._spare else np.empty(shape, np.float16)
        batch_size = self.config.batch_size
        while good:
            rows, good = good[:batch_size], good[batch_size:]
            # Rows of one batch lie together unless samples failed between them; then they are copied into place.
            images = torch.from_numpy(loaded.blocks["image"][rows])
            try:
                with _timed(seconds, "features"):
                    features = self.extractor.features(images)
                    self._wait()
                with _timed(seconds, "upsample"):
                    together = rows[-1] - rows[0] + 1 == len(rows)
                    place = (
                        block[rows[0] : rows[-1] + 1] if together else np.empty((len(rows), *shape[1:]), block.dtype)
                    )
                    fits = self.extractor.upsample(features, images, torch.from_numpy(place))
                    if not together:
                        block[rows] = place
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise
                good, batch_size = rows + good, max(1, batch_size // 2)
                continue
            for row, fit in zip(rows, fits, strict=False):
                records[row] = replace(records[row], explained_variance=fit.explained_variance)
                if not fit.explained_variance > fit.before:
                    records[row] = replace(records[row], flags=(*records[row].flags, "fit_no_better"))
            for row, one in zip(rows, place, strict=True):
                # float16 ends at 65504: what does not fit is infinite, and would poison a probe.
                if bool(((torch.from_numpy(one.view(np.int16)) & 0x7C00) == 0x7C00).any()):
                    records[row] = replace(
                        records[row],
                        status="failed",
                        reason=Reason.NOT_FINITE.value,
                        detail="NaN, or beyond float16's 65504; use norm='layer' to normalise, or look at the weights",
                    )
        if self.config.mantissa_bits is not None:
            with _timed(seconds, "upsample"):
                round_mantissa(block, self.config.mantissa_bits)
        return block, tuple(records)

    def _wait(self) -> None:
        if self.extractor.device.type == "cuda":
            torch.cuda.synchronize()  # or the features' time would be counted as the upsampler's


class Featurizer:
    """The actor: rows of loaded units in, rows with receipts out. Features never leave it but for the store."""

    def __init__(self, config: PrecomputeConfig, setup: Setup, layout: Layout, plan_digest: str) -> None:
        # While one thread computes and one writes, each asks for Python's lock all the time: hand it over sooner.
        sys.setswitchinterval(0.0005)
        self.processor = UnitProcessor(config, setup, layout, plan_digest)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One unit, as ``pipeline.load.load_row`` made it, to ``{"receipt": [JSON]}``."""
        receipts = []
        for key, loaded in unpack(batch):
            receipt = loaded if isinstance(loaded, Receipt) else self.processor.process(key, loaded)
            receipts.append(receipt.to_json())
        return {"receipt": np.array(receipts, dtype=object)}


def pca_place(store: str) -> str:
    """Where a store keeps its PCA."""
    return storage.join(store, "plan", "pca.safetensors")


def take_pca(store: str, config: PrecomputeConfig, setup: Setup) -> tuple[PCA, bytes]:
    """Another store's PCA and its file's bytes, for a run with ``config`` and ``setup``.

    Raises:
        ConfigError: its backbone gives other features than this run's.
        StoreError: there is no such store, or it has all channels.
    """
    other = stored_config(store)
    if "pca" not in other[1]["digests"]:
        raise StoreError(f"{store} holds all channels and no PCA; leave pca_from out, or give a store made with --pca")
    differences = list_differences(feature_space(*other), feature_space(config, asdict(setup)))
    if differences:
        raise ConfigError(
            f"the PCA of {store} is of other features: {'; '.join(differences)}. Give the options of the backbone that "
            "store was made with, or --pca to fit a PCA to this data set"
        )
    place = pca_place(store)
    return load_pca(storage.local_copy(place)), storage.read_bytes(place)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started

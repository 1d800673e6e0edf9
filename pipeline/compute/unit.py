"""One unit from decoded images to stored shards: extract, upsample, encode, write, and the receipt."""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from featup.errors import FeatupError
from featup.images import resize_images
from pipeline.compute.device import context_is_broken, set_threads
from pipeline.compute.load import LoadedUnit
from pipeline.compute.models import Extractor, Setup, weights_place
from pipeline.compute.outcome import Outcome, failed_unit
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import EnvironmentFault, PipelineError, Reason, StoreError, UnitError
from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey
from pipeline.store.layout import FAILED, NOTHING, OK, Layout
from pipeline.store.ledger import Ledger, Receipt, SampleRecord
from pipeline.store.provenance import stored_pca
from pipeline.store.writer import StoreWriter, round_mantissa, row_checksum

__all__ = ["BROKEN_CONTEXT_STATUS", "UnitProcessor"]

BROKEN_CONTEXT_STATUS = 66
"""Exit status of a process whose CUDA context broke."""


class UnitProcessor:
    """Turns loaded units into features and writes them; safe to call from two threads.

    Computing and writing each have a lock of their own: while one thread writes a unit, the other computes the next.
    """

    def __init__(
        self,
        config: PrecomputeConfig,
        setup: Setup,
        layout: Layout,
        processes: int = 1,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        """
        Args:
            config: every option.
            setup: the facts of the models that every process must agree on.
            layout: the store's.
            processes: how many processes share this machine's cores.
            end_process: ends this process with an exit status, without any clean-up.

        Raises:
            StoreError: the weights this process found are not those the store was made for, or there is no store.
        """
        self.config = config
        self.layout = layout
        self._processes = processes
        self._end_process = end_process
        self.threads = set_threads(config.threads, processes)
        pca, pca_digest = None, {}
        if config.projects:
            pca = stored_pca(config.out)[0]
            pca_digest = {"pca": setup.digests["pca"]}
        self.extractor = Extractor(config, pca, weights_place(config))
        digests = self.extractor.digests | pca_digest
        if digests != setup.digests:
            raise StoreError(
                f"the models on {platform.node()} are {digests}, the store was made for {setup.digests}; "
                "give every node the same weight files"
            )
        self.writer = StoreWriter(config.out, layout, self.threads)
        self.ledger = Ledger(storage.join(config.out, "ledger"))
        self._computing, self._writing = threading.RLock(), threading.RLock()
        # Blocks to use again: memory fresh from the system costs a page fault every 4 KiB, a tenth of the time here.
        self._spare: list[NDArray[np.float16]] = []

    def process(self, key: UnitKey, loaded: LoadedUnit) -> Outcome:
        """Features, data, receipt, in that order. A unit that is done already is left alone.

        A unit that ended its process ``unit_attempts`` times, in this run or an earlier one, is given up: its samples
        are recorded as failed. A CUDA error that breaks the context ends the process; another one takes its place.
        """
        set_threads(self.config.threads, self._processes)
        return _outcome(key, loaded, lambda: self._process(key, loaded))

    def _process(self, key: UnitKey, loaded: LoadedUnit) -> Outcome:
        receipt = self.ledger.get(key, loaded.shard)
        if receipt is not None:
            return Outcome(receipt)
        earlier = self.ledger.attempts(key.unit)
        with ExitStack() as alone:
            if earlier:
                # A process died with this unit in it: it runs alone now, or it would take others with it, and they
                # would be counted for what it does.
                alone.enter_context(self._computing)
                alone.enter_context(self._writing)
            self.ledger.begin_attempt(key.unit, earlier)
            work = self._give_up if earlier >= self.config.unit_attempts else self._attempt
            outcome = _outcome(key, loaded, lambda: Outcome(work(key, loaded)))
            self.ledger.end_attempt(key.unit)
            return outcome

    def _attempt(self, key: UnitKey, loaded: LoadedUnit) -> Receipt:
        failures = 0
        while True:
            try:
                return self._make(key, loaded)
            except (FeatupError, RuntimeError, ValueError) as error:
                if context_is_broken(error):
                    print(f"{key}: {error}; this process cannot use its GPU any more and is replaced", flush=True)
                    self._end_process(BROKEN_CONTEXT_STATUS)
                failures += 1
                # What a device computes may fail by chance; what a store refuses, its retries have asked for already.
                if failures >= self.config.unit_attempts or isinstance(error, (OSError, PipelineError)):
                    raise

    def _make(self, key: UnitKey, loaded: LoadedUnit) -> Receipt:
        seconds, sizes = dict(loaded.seconds), dict(loaded.sizes)
        with self._computing:
            features, records = self.compute(loaded, seconds)
        ok = [offset for offset, record in enumerate(records) if record.status == "ok"]
        status = np.full(self.layout.rows_per_shard, NOTHING, np.uint8)
        status[: len(records)] = FAILED
        status[ok] = OK
        blocks = {**loaded.blocks, "features": features, "status": status}
        del blocks["image"]
        if self.layout.image:
            with _timed(seconds, "image"):
                blocks["image"] = self._stored_images(loaded.blocks["image"], ok)
        for spec in self.layout.arrays[:-1]:
            blocks[spec.name][status != OK] = spec.fill
        with self._writing:
            with _timed(seconds, "encode_write"):
                sizes["stored"] = self.writer.write(key, blocks)
                sizes["encode_write"] = len(ok) * self.layout.sample_bytes
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
                shard=loaded.shard,
                samples=records,
                checksums=checksums,
                seconds=seconds,
                sizes=sizes,
                worker={
                    "host": platform.node(),
                    "pid": os.getpid(),
                    "threads": self.threads,
                    "finished": round(time.time(), 3),
                },
            )
            self.ledger.commit(receipt)
        self._spare.append(features)
        return receipt

    def _give_up(self, key: UnitKey, loaded: LoadedUnit) -> Receipt:
        """Record a unit's samples as failed, for good: the job goes on without it."""
        error = UnitError(
            f"{key} ended its process {self.config.unit_attempts} times and is given up; look at its samples and at "
            "the machine's memory, then run the same command with --retry-failed unit_failed"
        )
        failed = failed_unit(key, loaded.shard, loaded.records, error)
        status = np.full(self.layout.rows_per_shard, NOTHING, np.uint8)
        status[: len(loaded.records)] = FAILED
        blocks = {
            spec.name: np.full((self.layout.rows_per_shard, *spec.row_shape), spec.fill, spec.dtype)
            for spec in self.layout.arrays
        } | {"status": status}
        with self._writing:
            self.writer.write(key, blocks)
            nothing: dict[str, list[int | None]] = {
                spec.name: [None] * len(loaded.records) for spec in self.layout.arrays
            }
            receipt = replace(failed, error="", checksums=nothing)
            self.ledger.commit(receipt)
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
                    fields = self.extractor.upsample(features, images, torch.from_numpy(place))
                    if not together:
                        block[rows] = place
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise
                good, batch_size = rows + good, max(1, batch_size // 2)
                continue
            for row, field in zip(rows, fields, strict=False):
                explained, baseline = field.explained_variance, field.baseline_explained_variance
                records[row] = replace(records[row], explained_variance=explained)
                if explained is not None and baseline is not None and not explained > baseline:
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

    def _stored_images(self, images: NDArray[np.uint8], good: list[int]) -> NDArray[np.uint8]:
        """The good rows of decoded images ``[R, H, W, 3]`` at the features' size, zeros elsewhere.

        They are resized from what guided the upsampler, so that their pixels are the features'. Always a copy: the
        decoded images are read again if the unit is tried again.
        """
        size = (self.layout.height, self.layout.width)
        stored = np.zeros((len(images), *size, 3), np.uint8)
        for start in range(0, len(good), self.config.batch_size):
            rows = good[start : start + self.config.batch_size]
            stored[rows] = resize_images(torch.from_numpy(images[rows]), size).numpy()
        return stored

    def _wait(self) -> None:
        if self.extractor.device.type == "cuda":
            torch.cuda.synchronize()  # or the features' time would be counted as the upsampler's


def _outcome(key: UnitKey, loaded: LoadedUnit, work: Callable[[], Outcome]) -> Outcome:
    """What became of a unit, its errors included; any other error is a fault of this program and ends the job."""
    try:
        return work()
    except EnvironmentFault as error:
        return Outcome(failed_unit(key, loaded.shard, loaded.records, error), "environment")
    except (FeatupError, PipelineError, OSError, RuntimeError, ValueError) as error:
        return Outcome(failed_unit(key, loaded.shard, loaded.records, error), "unit")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started

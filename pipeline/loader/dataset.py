"""PyTorch datasets over a store.

Only paths travel to a worker; the store is opened there, at the first read. Under ``spawn`` and ``forkserver`` that is
always safe. Under ``fork`` a worker inherits locks whose threads it does not have: a remote file system that was used
in the parent would wait for them for ever, and is refused.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils.data import Dataset, get_worker_info

from pipeline.errors import ConfigError, SampleKeyError
from pipeline.loader.batches import Batch
from pipeline.loader.memory import BatchMemory, SharedBatch, SharedMemory
from pipeline.loader.readers import Readers
from pipeline.redaction import redact
from pipeline.store.keys import SampleKeys
from pipeline.store.layout import ArraySpec, Layout, store_attributes
from pipeline.store.rows import good_rows
from pipeline.store.shard_reader import Window

__all__ = ["FeatureDataset"]


class FeatureDataset(Dataset[dict[str, Any]]):
    """The good samples of a store, in the order of their rows; holes and failed samples are not there.

    ``dataset[i]`` is a dictionary with, for each array asked for, ``features`` float ``[H, W, C]``, ``seg`` int64
    ``[H, W]``, ``depth`` float32 ``[H, W]`` in metres with NaN where unknown, ``cls`` int64 ``[]``, ``valid`` bool
    ``[H, W]``, ``image`` uint8 ``[H, W, 3]``; ``row``, int64 ``[]``, the row in the store; and ``key``, the sample's
    name in its input shard. With a window or a crop, ``H`` and ``W`` are its. With a crop or flips, ``window``, int64
    ``[4]``, is (top, left, height, width) of what was read, and ``mirrored``, bool ``[]``, whether it was mirrored.
    ``dataset["img_0007"]`` is the sample of that key.
    """

    def __init__(
        self,
        path: str,
        arrays: Sequence[str] = ("features",),
        *,
        window: Window | None = None,
        crop: tuple[int, int] | None = None,
        flip: float = 0.0,
        dtype: torch.dtype = torch.float32,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        keys: bool = True,
        partial: bool = False,
    ) -> None:
        """
        Args:
            path: the folder or URL that was ``--out``.
            arrays: which arrays to read; ``features``, ``image`` and the labels that were stored.
            window: (top, left, height, width) in pixels of the stored features; only the tiles it touches are read.
            crop: (height, width) in pixels of a window at another place each time a sample is read, the same for all of
                its arrays. torch's generator chooses it: ``torch.manual_seed`` decides all of them, or the DataLoader's
                own generator where it has workers.
            flip: probability from 0 to 1 that a sample is mirrored left to right, all of its arrays together.
            dtype: of the features.
            transform: called with each sample.
            keys: whether samples carry their keys. A process reads them from the index, a thousand units at a time, and
                remembers 64 MiB of them, about two million. In random order over a larger store a key takes some
                milliseconds: leave them out where that counts.
            partial: serve a store whose job has not ended as well, with the samples that are in it now.

        Raises:
            StoreError: there is no store.
            IncompleteStoreError: its job has not ended.
            StoreFormatError: a newer or another program wrote it.
            ConfigError: an array it does not have, a window outside of the image, or a probability that is none.
        """
        self.path = path
        self.arrays = tuple(arrays)
        self.window = window
        self.crop = crop
        self.flip = flip
        self.dtype = dtype
        self.transform = transform
        attributes = store_attributes(path)
        layout = Layout.from_dict(attributes["layout"])
        self.layout = layout
        known = [spec.name for spec in layout.arrays if spec.name != "status"]
        missing = [name for name in self.arrays if name not in known]
        if missing:
            raise ConfigError(f"{path} has no arrays {missing}; it has {known}")
        if crop is not None and (not isinstance(crop, Sequence) or len(crop) != 2):
            raise ConfigError(f"crop={crop!r} must be two numbers, (height, width), such as (112, 112)")
        if crop is not None and window is not None:
            raise ConfigError(f"window={window} is one place and crop={crop} another one each time; give one of them")
        if crop is not None:
            _check_window((0, 0, *crop), f"crop (height, width) = {crop}", layout)
        if window is not None:
            _check_window(window, f"window (top, left, height, width) = {window}", layout)
        if not 0 <= flip <= 1:
            raise ConfigError(f"flip={flip} is a probability, from 0 to 1")
        self.keys = keys
        self.complete = bool(attributes.get("complete"))
        self._keys = SampleKeys(path, attributes)
        self._open: Readers | None = None
        self._memory = BatchMemory()
        self._shared_memory = SharedMemory()
        # Read here without threads that stay behind, so that a fork is possible afterwards.
        self.rows = good_rows(path, attributes, partial)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> dict[str, Any]:
        return self.sample(index) if isinstance(index, str) else self._sample(int(self.rows[index]))

    def __repr__(self) -> str:
        said = [f"{len(self):,} samples", *map(self._described, self.arrays)]
        if self.window is not None:
            said.append(f"window (top, left, height, width) = {self.window}")
        if self.crop is not None:
            said.append(f"crops of (height, width) = {self.crop}")
        if self.flip:
            said.append(f"mirrored with probability {self.flip}")
        if not self.complete:
            said.append("partial: its job has not ended")
        return f"FeatureDataset({redact(self.path)}: {'; '.join(said)})"

    def sample(self, key: str, shard: str | None = None) -> dict[str, Any]:
        """The sample with a key, looked for in the whole index: a second or two for ten million local samples.

        Args:
            key: its name in its input shard.
            shard: the URL of its input shard, or the end of it, where several shards have a sample of this name.

        Raises:
            SampleKeyError: no good sample has this key, or several have.
        """
        self._readers()
        found = [one for one in self._keys.find(key) if shard is None or f"/{one.shard}".endswith(f"/{shard}")]
        good = [one for one in found if one.status == "ok"]
        if len(good) == 1:
            return self._sample(good[0].row)
        where = f"{key!r} of a shard {shard}" if shard else repr(key)
        if good:
            raise SampleKeyError(
                f"{self.path} has {len(good)} samples {where}, of the shards "
                f"{', '.join(one.shard for one in good)}; say which: "
                f"dataset.sample({key!r}, shard={good[0].shard!r})"
            )
        if found:
            raise SampleKeyError(f"{self.path}: sample {where} failed: {found[0].reason} (shard {found[0].shard})")
        raise SampleKeyError(
            f"{self.path} has no sample {where}; keys are the names in the input shards, without their extensions"
        )

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several samples, read into one tensor for each array; a DataLoader calls this."""
        rows = [int(self.rows[index]) for index in indices]
        if self.transform is not None:
            return [self.transform(dict(sample)) for sample in self._read(rows)]
        # In a worker it lies where the process that gets it can read it.
        return cast(list[dict[str, Any]], self._read(rows, shared=get_worker_info() is not None))

    def _sample(self, row: int) -> dict[str, Any]:
        sample = dict(self._read([row])[0])
        return sample if self.transform is None else self.transform(sample)

    # Threads that read do not know the mode, and memory that is used again must not keep it.
    @torch.inference_mode(False)
    def _read(self, rows: list[int], shared: bool = False) -> Batch:
        windows = [self._window() for _ in rows]
        mirrored = [self.flip > 0 and float(torch.rand(())) < self.flip for _ in rows]
        readers = self._readers()
        specs = {spec.name: spec for spec in self.layout.arrays}
        whole: dict[str, Any] = {}
        segments = {}
        for name in self.arrays:
            shape, dtype = (len(rows), *self._shape(specs[name])), self._type(specs[name])
            if shared:
                segments[name] = self._shared_memory.take(shape, dtype)
                whole[name] = segments[name][0]
            else:
                whole[name] = self._memory.take(shape, dtype)

        def fill(number: int) -> None:
            for name, reader in readers.here().items():
                per_pixel = len(reader.spec.row_shape) >= 2
                window = windows[number] if per_pixel else None
                reader.read(rows[number], whole[name][number], window, mirrored[number] and per_pixel)

        readers.each(fill, len(rows))
        whole["row"] = torch.tensor(rows)
        if self.crop is not None or self.flip:
            size = (self.layout.height, self.layout.width)
            whole["window"] = torch.tensor([window or (0, 0, *size) for window in windows])
            whole["mirrored"] = torch.tensor(mirrored)
        if self.keys:
            whole["key"] = [self._keys.key(row) for row in rows]
        return Batch(SharedBatch(whole, segments) if shared else whole, len(rows))

    def _window(self) -> Window | None:
        if self.crop is None:
            return self.window
        height, width = self.crop
        top = int(torch.randint(self.layout.height - height + 1, ()))
        left = int(torch.randint(self.layout.width - width + 1, ()))
        return top, left, height, width

    def _shape(self, spec: ArraySpec) -> tuple[int, ...]:
        """Shape of an array in a sample."""
        if len(spec.row_shape) < 2:
            return spec.row_shape
        size = self.crop or (self.window and self.window[2:]) or spec.row_shape[:2]
        return (*size, *spec.row_shape[2:])

    def _described(self, name: str) -> str:
        """Name, type and shape of an array as samples have it."""
        (spec,) = [spec for spec in self.layout.arrays if spec.name == name]
        return f"{name} {str(self._type(spec)).removeprefix('torch.')} {list(self._shape(spec))}"

    def _type(self, spec: ArraySpec) -> torch.dtype:
        if spec.name == "features":
            return self.dtype
        if spec.name == "valid":
            return torch.bool
        return torch.uint8 if spec.name == "image" else torch.float32 if spec.dtype.startswith("float") else torch.int64

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def _readers(self) -> Readers:
        if self._open is None or self._open.process != os.getpid():
            self._open = Readers(self.path, self.arrays, self.layout)
        return self._open


def _check_window(window: Window, given: str, layout: Layout) -> None:
    """Refuse a window that is not inside the image; ``given`` says what the user gave."""
    top, left, height, width = window
    inside = top + height <= layout.height and left + width <= layout.width
    if min(top, left) < 0 or min(height, width) < 1 or not inside:
        raise ConfigError(f"{given} is not inside the features' {layout.height}x{layout.width} (height x width)")

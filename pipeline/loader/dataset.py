"""PyTorch datasets over a store.

Only paths travel to a worker; the store is opened there, at the first read. Under ``spawn`` and ``forkserver`` that is
always safe. Under ``fork`` a worker inherits locks whose threads it does not have: a reader with threads of its own
(the zarrs codecs, remote file systems), once used in the parent, would wait for them for ever, and is refused.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.errors import ConfigError, ForkError, SampleKeyError
from pipeline.inputs import storage
from pipeline.redaction import redact
from pipeline.store.keys import SampleKeys
from pipeline.store.layout import AnyArray, Layout, open_arrays, store_attributes
from pipeline.store.rows import good_rows

__all__ = ["Codecs", "FeatureDataset"]


Codecs = Literal["zarr", "zarrs"]
Window = tuple[int, int, int, int]
# Which process first used a reader with threads of its own; a child made by fork finds its parent's number here.
_threaded_in: int | None = None


def _inherited() -> bool:
    return _threaded_in is not None and _threaded_in != os.getpid()


class FeatureDataset(Dataset[dict[str, Any]]):
    """The good samples of a store, in the order of their rows; holes and failed samples are not there.

    ``dataset[i]`` is a dictionary with, for each array asked for, ``features`` float ``[H, W, C]``, ``seg`` int64
    ``[H, W]``, ``depth`` float32 ``[H, W]`` in metres with NaN where unknown, ``cls`` int64 ``[]``, ``valid`` bool
    ``[H, W]``, ``image`` uint8 ``[H, W, 3]``; ``row``, int64 ``[]``, the row in the store; and ``key``, the sample's
    name in its input shard. With a window, ``H`` and ``W`` are the window's. ``dataset["img_0007"]`` is the sample of
    that key.
    """

    def __init__(
        self,
        path: str,
        arrays: Sequence[str] = ("features",),
        *,
        window: Window | None = None,
        dtype: torch.dtype = torch.float32,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        keys: bool = True,
        codecs: Codecs = "zarr",
        partial: bool = False,
    ) -> None:
        """
        Args:
            path: the folder or URL that was ``--out``.
            arrays: which arrays to read; ``features``, ``image`` and the labels that were stored.
            window: (top, left, height, width) in pixels of the stored features; only the tiles it touches are read.
            dtype: of the features.
            transform: called with each sample.
            keys: whether samples carry their keys. A process reads them from the index, a thousand units at a time, and
                remembers 64 MiB of them, about two million. In random order over a larger store a key takes some
                milliseconds: leave them out where that counts.
            codecs: ``zarr`` checks every chunk against its checksum; ``zarrs`` decodes in Rust, faster, and does not
                check chunks that are read alone (zarrs 0.2.3), so it is for stores that ``jobs.verify`` found clean.
            partial: serve a store whose job has not ended as well, with the samples that are in it now.

        Raises:
            StoreError: there is no store.
            IncompleteStoreError: its job has not ended.
            ConfigError: an array it does not have, or a window outside of the image.
        """
        self.path = path
        self.arrays = tuple(arrays)
        self.window = window
        self.dtype = dtype
        self.transform = transform
        self.codecs: Codecs = codecs
        attributes = store_attributes(path)
        layout = Layout.from_dict(attributes["layout"])
        self.layout = layout
        known = [spec.name for spec in layout.arrays if spec.name != "status"]
        missing = [name for name in self.arrays if name not in known]
        if missing:
            raise ConfigError(f"{path} has no arrays {missing}; it has {known}")
        if window is not None:
            top, left, height, width = window
            if (
                min(top, left) < 0
                or min(height, width) < 1
                or top + height > layout.height
                or left + width > layout.width
            ):
                raise ConfigError(
                    f"window (top, left, height, width) = {window} is not inside the features' "
                    f"{layout.height}x{layout.width} (height x width)"
                )
        self.keys = keys
        self.complete = bool(attributes.get("complete"))
        self._keys = SampleKeys(path, attributes)
        self._open: tuple[int, dict[str, AnyArray]] | None = None
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
        self._arrays()
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

    def _sample(self, row: int) -> dict[str, Any]:
        arrays = self._arrays()
        sample: dict[str, Any] = {name: self._read(name, arrays[name], row) for name in self.arrays}
        sample["row"] = torch.tensor(row)
        if self.keys:
            sample["key"] = self._keys.key(row)
        return sample if self.transform is None else self.transform(sample)

    def _described(self, name: str) -> str:
        """Name, type and shape of an array as samples have it."""
        (spec,) = [spec for spec in self.layout.arrays if spec.name == name]
        shape = spec.row_shape
        if self.window is not None and shape:
            shape = (*self.window[2:], *shape[2:])
        return f"{name} {str(self._type(name, spec.dtype)).removeprefix('torch.')} {list(shape)}"

    def _type(self, name: str, stored: str) -> torch.dtype:
        if name == "features":
            return self.dtype
        if name == "valid":
            return torch.bool
        return torch.uint8 if name == "image" else torch.float32 if stored.startswith("float") else torch.int64

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def _read(self, name: str, array: AnyArray, row: int) -> Tensor:
        if self.window is None or array.ndim == 1:
            data = np.asarray(array[row])
        else:
            top, left, height, width = self.window
            data = np.asarray(array[row, top : top + height, left : left + width])
        if data.dtype == np.uint16:
            data = data.astype(np.int64)  # torch computes with few of numpy's unsigned types
        return torch.from_numpy(data).to(self._type(name, data.dtype.name))

    def _arrays(self) -> dict[str, AnyArray]:
        global _threaded_in
        if self._open is not None and self._open[0] == os.getpid():
            return self._open[1]
        local = storage.is_local(self.path)
        threaded = self.codecs == "zarrs" or not local
        if threaded and _inherited():
            raise ForkError(
                f"{self.path}: process {os.getpid()} was forked from {_threaded_in}, which had read a store through "
                f"{'zarrs' if local else 'a remote file system'}: its threads did not come along, and the first read "
                "would wait for them for ever. Give the DataLoader multiprocessing_context='spawn' (or 'forkserver')"
                + (", or codecs='zarr'" if local else "")
            )
        if threaded:
            _threaded_in = os.getpid()
        self._open = (os.getpid(), open_arrays(self.path, self.arrays, self.codecs))
        return self._open[1]

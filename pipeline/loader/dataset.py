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

from pipeline.errors import ConfigError, ForkError
from pipeline.inputs import storage
from pipeline.store.layout import AnyArray, Layout, open_arrays, store_attributes
from pipeline.store.rows import good_rows

__all__ = ["Codecs", "FeatureDataset"]


Codecs = Literal["zarr", "zarrs"]
Window = tuple[int, int, int, int]
# Which process first used a reader with threads of its own; a child made by fork finds its parent's number here.
_threaded_in: int | None = None


def _inherited() -> bool:
    return _threaded_in is not None and _threaded_in != os.getpid()


class FeatureDataset(Dataset[dict[str, Tensor]]):
    """The good samples of a store, in the order of their rows; holes and failed samples are not there.

    ``dataset[i]`` is a dictionary with, for each array asked for, ``features`` float ``[H, W, C]``, ``seg`` int64
    ``[H, W]``, ``depth`` float32 ``[H, W]`` in metres with NaN where unknown, ``cls`` int64 ``[]``, ``valid`` bool
    ``[H, W]``; and ``row``, int64 ``[]``, the row in the store. With a window, ``H`` and ``W`` are the window's.
    """

    def __init__(
        self,
        path: str,
        arrays: Sequence[str] = ("features",),
        *,
        window: Window | None = None,
        dtype: torch.dtype = torch.float32,
        transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        codecs: Codecs = "zarr",
        partial: bool = False,
    ) -> None:
        """
        Args:
            path: the folder or URL that was ``--out``.
            arrays: which arrays to read; ``features`` and the labels that were stored.
            window: (top, left, height, width) in pixels of the stored features; only the tiles it touches are read.
            dtype: of the features.
            transform: called with each sample.
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
        self._open: tuple[int, dict[str, AnyArray]] | None = None
        # Read here without threads that stay behind, so that a fork is possible afterwards.
        self.rows = good_rows(path, attributes, partial)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = int(self.rows[index])
        arrays = self._arrays()
        sample = {name: self._read(name, arrays[name], row) for name in self.arrays}
        sample["row"] = torch.tensor(row)
        return sample if self.transform is None else self.transform(sample)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def _read(self, name: str, array: AnyArray, row: int) -> Tensor:
        if self.window is None or array.ndim == 1:
            data = np.asarray(array[row])
        else:
            top, left, height, width = self.window
            data = np.asarray(array[row, top : top + height, left : left + width])
        if name == "features":
            return torch.from_numpy(data).to(self.dtype)
        if name == "valid":
            return torch.from_numpy(data.astype(bool))
        return torch.from_numpy(data if data.dtype.kind == "f" else data.astype(np.int64))

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

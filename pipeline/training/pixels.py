"""The labelled pixels a probe is fitted on: how many of which images, and their features in a store."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.errors import InputError
from pipeline.loader import FeatureDataset, Window
from pipeline.loader.readers import Readers
from pipeline.training.tasks import Task

__all__ = ["PixelDataset", "PixelSampling", "tile_windows"]


@dataclass(frozen=True)
class PixelSampling:
    """How many pixels of which of ``images`` a probe is fitted on, and which pixels; everything follows from a seed.

    ``pixels`` of each image, or ``max_vectors`` in all where that is less. ``max_vectors`` are shared out evenly: the
    images differ by one pixel at most, and of more images than ``max_vectors`` that many have one pixel each.
    """

    images: int
    pixels: int
    max_vectors: int
    seed: int

    def counts(self) -> dict[int, int]:
        """How many pixels of each image are sampled, by image number, ascending; images without any are left out."""
        each, more = divmod(min(self.images * self.pixels, self.max_vectors), self.images)
        extra = sorted(random.Random(self.seed).sample(range(self.images), more))
        counts = dict.fromkeys(range(self.images), each) if each else {}
        return counts | {image: each + 1 for image in extra}

    def choose(self, image: int, count: int, known: Tensor) -> Tensor:
        """``count`` pixels of an image, all labelled ones where there are fewer.

        Args:
            image: The image's number; the choice follows from it and the seed.
            count: How many.
            known: Where a pixel has a label, bool ``[H, W]``.

        Returns:
            Indices into the flattened image ``[P]``, without repeats.
        """
        labelled = known.flatten().nonzero()[:, 0]
        order = np.random.default_rng([self.seed, image]).permutation(len(labelled))
        return labelled[torch.from_numpy(order[:count])]


class PixelDataset(Dataset[dict[str, Tensor]]):
    """The sampled pixels of the good samples of a store, one item an image.

    Of each image the label is read whole and the features only in the tiles (chunks) that hold sampled pixels; images
    without sampled pixels are no items. ``dataset[i]`` is a dictionary of ``features`` float32 ``[P, C]``, the prepared
    labels ``[P]`` under the task's kind, and ``image`` int64 ``[P]``, the image's number among the good samples.
    """

    def __init__(self, store: str, task: Task, pixels: int, max_vectors: int, seed: int) -> None:
        """
        Args:
            store: The folder or URL that was ``--out``.
            task: Which label is read, and how.
            pixels, max_vectors, seed: See :class:`PixelSampling`.

        Raises:
            StoreError: there is no store.
            ConfigError: it does not have these labels.
            InputError: it holds no sample.
        """
        self.store = store
        self.task = task
        # With a process's first label the loader checks that this process may read the store.
        self.labels = FeatureDataset(store, [task.kind], keys=False)
        if not len(self.labels):
            raise InputError(f"{store} holds no sample to fit on; see its index for the reasons")
        self.sampling = PixelSampling(len(self.labels), pixels, max_vectors, seed)
        counts = self.sampling.counts()
        self.images = np.array(list(counts), np.int64)
        self.counts = np.array(list(counts.values()), np.int64)
        self._features: Readers | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = int(self.images[index])
        sample = self.labels[image]
        labels = self.task.prepare(sample[self.task.kind])
        chosen = self.sampling.choose(image, int(self.counts[index]), self.task.known(labels))
        features = self._read(int(sample["row"]), np.unravel_index(chosen.numpy(), labels.shape))
        return {
            "features": torch.from_numpy(features),
            self.task.kind: labels.flatten()[chosen],
            "image": torch.full((len(chosen),), image),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None}

    def _read(self, row: int, pixels: tuple[NDArray[np.intp], ...]) -> NDArray[np.float32]:
        """Features of pixels (y, x) of a row of the store: float32 ``[P, C]``."""
        layout = self.labels.layout
        if self._features is None or self._features.process != os.getpid():
            self._features = Readers(self.store, ["features"], layout)
        reader = self._features.here()["features"]
        y, x = pixels
        features = np.empty((len(y), layout.channels), np.float32)
        for top, left, height, width in tile_windows(y, x, layout.tile):
            inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
            window = torch.empty((height, width, layout.channels), dtype=torch.float16)
            reader.read(row, window, (top, left, height, width))
            features[inside] = window.numpy()[y[inside] - top, x[inside] - left]
        return features


def tile_windows(y: NDArray[np.intp], x: NDArray[np.intp], tile: tuple[int, int]) -> Iterator[Window]:
    """Windows (top, left, height, width) that cover the tiles of these pixels, each tile once, and no other tile.

    Neighbouring tiles share a window, so that an image whose tiles are all needed is read at once.

    Args:
        y, x: Of the pixels, ``[P]``.
        tile: (height, width) of a tile.
    """
    if not len(y):
        return
    rows, columns = y // tile[0], x // tile[1]
    needed = np.zeros((int(rows.max()) + 1, int(columns.max()) + 1), bool)
    needed[rows, columns] = True
    # Runs of tiles, (left, right), that go on from the rows of tiles above, with the row where they begin.
    tops: dict[tuple[int, int], int] = {}
    for row in range(len(needed) + 1):
        edges = np.flatnonzero(np.diff(needed[row], prepend=False, append=False)) if row < len(needed) else ()
        runs = {(int(left), int(right)) for left, right in zip(edges[::2], edges[1::2], strict=True)}
        for left, right in tops.keys() - runs:
            top = tops.pop((left, right))
            yield top * tile[0], left * tile[1], (row - top) * tile[0], (right - left) * tile[1]
        tops |= {run: row for run in runs - tops.keys()}

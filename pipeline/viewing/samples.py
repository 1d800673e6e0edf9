"""Pictures of samples: the image, its features in colours, its labels."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featup.pictures import (
    class_colours,
    class_palette,
    component_scale,
    scaled_colours,
    sheet,
    side_by_side,
    value_colours,
)
from featup.projection import PCA, PCAFit
from pipeline.decode.kinds import label_spec
from pipeline.errors import ConfigError
from pipeline.loader import FeatureDataset
from pipeline.store.layout import store_attributes, stored_layout
from pipeline.store.parquet import read_columns
from pipeline.store.partitions import partition_place
from pipeline.store.provenance import stored_config
from pipeline.store.segments import UNITS_PER_SEGMENT

__all__ = [
    "FeatureColours",
    "contact_sheet",
    "describe_sample",
    "feature_colours",
    "fitted",
    "open_dataset",
    "sample_picture",
    "spread",
    "without_padding",
]

Pixels = NDArray[np.uint8]
Panel = tuple[str, Pixels]
# Height of a panel in a contact sheet, and the least of a single sample's, in pixels.
_SMALL, _LARGE = 192, 448
# Sheets are about so much wider than high.
_ASPECT = 1.4
# A PCA of full features is fitted on so many pixels a side of each image.
_FIT_SIDE = 64


def open_dataset(url: str, arrays: Sequence[str] = ("features", "valid")) -> FeatureDataset:
    """A store to look at, also while its job runs; of ``arrays`` those that it has.

    Raises:
        ConfigError: there is no sample in it yet.
    """
    there = [spec.name for spec in stored_layout(url).arrays]
    dataset = FeatureDataset(url, [name for name in arrays if name in there], partial=True)
    if not len(dataset):
        raise ConfigError(f"{url} holds no sample that could be shown; see featup status {url}")
    return dataset


def spread(count: int, total: int) -> list[int]:
    """At most ``count`` of ``total`` numbers, evenly over all of them."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def without_padding(sample: dict[str, Any]) -> Tensor:
    """The features of a sample, NaN where the image is padding."""
    features: Tensor = sample["features"]
    if "valid" in sample:
        features[~sample["valid"]] = torch.nan
    return features


def feature_colours(dataset: FeatureDataset, numbers: Sequence[int]) -> list[Pixels]:
    """Features of samples in colours, all on one scale: their first three principal components.

    Those that are stored; of a store of all channels those of a PCA that is fitted to these samples.

    Args:
        dataset: of features, and ``valid`` where padding shall be black.
        numbers: of the samples in it.
    """
    colours = FeatureColours(dataset, numbers)
    return [colours(number) for number in numbers]


class FeatureColours:
    """Colours of features: equal features have equal colours in all samples.

    They are the first three principal components: those that are stored; of a store of all channels those of a PCA.
    """

    def __init__(self, dataset: FeatureDataset, numbers: Sequence[int]) -> None:
        """
        Args:
            dataset: of features, and ``valid`` where padding shall be black.
            numbers: of the samples that the PCA and the scale of the colours are fitted to.
        """
        config, setup = stored_config(dataset.path, partial=True)
        components = config.projects
        self.dataset = dataset
        self.grid: tuple[int, int] = (setup["grid"][0], setup["grid"][1])
        self.pca = None if components else _fit_pca(dataset, numbers)
        self.scale = component_scale([self._components(number) for number in numbers])

    def __call__(self, number: int) -> Pixels:
        """The features of a sample in colours, uint8 ``[H, W, 3]``."""
        return scaled_colours(self._components(number), self.scale)

    def with_cell_means(self, number: int) -> tuple[Pixels, Pixels]:
        """The same, behind that of the means over each cell of the backbone's own map: about what was upsampled.

        Returns:
            Two of uint8 ``[H, W, 3]``; the first has one colour for each cell.
        """
        components = self._components(number)
        planes = torch.from_numpy(np.ascontiguousarray(components, np.float32)).movedim(-1, 0)
        means = torch.nn.functional.adaptive_avg_pool2d(planes, self.grid).movedim(0, -1)
        cells = Image.fromarray(scaled_colours(means.numpy(), self.scale))
        size = (self.dataset.layout.width, self.dataset.layout.height)
        return np.asarray(cells.resize(size, Image.Resampling.NEAREST)), scaled_colours(components, self.scale)

    def _components(self, number: int) -> NDArray[np.floating]:
        features = without_padding(self.dataset[number])
        components: NDArray[np.floating] = (
            # Without the others: of many samples these would fill the memory.
            features[..., :3].clone() if self.pca is None else self.pca.project(features)
        ).numpy()
        return components


def _fit_pca(dataset: FeatureDataset, numbers: Sequence[int]) -> PCA | None:
    """A PCA of three components of these samples; ``None`` where they have too few pixels, or channels, for one."""
    fit = PCAFit(dataset.layout.channels)
    down, right = (-(-side // _FIT_SIDE) for side in (dataset.layout.height, dataset.layout.width))
    for number in numbers:
        fit.add(without_padding(dataset[number])[::down, ::right])
    return fit.solve(3) if dataset.layout.channels >= 3 and fit.count > 3 else None


def contact_sheet(url: str, count: int = 12) -> Pixels:
    """A store's samples at a glance, spread evenly over it: image, features per cell of the backbone's map and per
    pixel, labels of each.

    Args:
        url: the store.
        count: how many.

    Raises:
        ConfigError: there is no sample in it yet.
    """
    dataset = open_dataset(url)
    numbers = spread(count, len(dataset))
    colours = FeatureColours(dataset, numbers)
    beside = open_dataset(url, _beside(dataset))
    lines = [side_by_side(_panels(beside, number, colours, _SMALL), _SMALL) for number in numbers]
    height, width = lines[0].shape[:2]
    columns = min(
        range(1, len(lines) + 1),
        key=lambda n: abs(np.log(n * width / (-(-len(lines) // n) * height) / _ASPECT)),
    )
    return sheet(lines, columns)


def sample_picture(url: str, key: str, shard: str | None = None) -> Pixels:
    """One sample, large: image, features per cell of the backbone's map and per pixel, labels side by side.

    Args:
        url: the store.
        key: the sample's name.
        shard: the end of its input shard's URL, where several have a sample of this name.

    Raises:
        SampleKeyError: no good sample has this key, or several have.
    """
    dataset = open_dataset(url)
    number = _number(dataset, key, shard)
    colours = FeatureColours(dataset, [number])
    side = max(_LARGE, dataset.layout.height)
    return side_by_side(_panels(open_dataset(url, _beside(dataset)), number, colours, side), side)


def describe_sample(url: str, key: str, shard: str | None = None) -> Iterator[str]:
    """What the index says of a sample, a line each; of a store that is not complete its row alone.

    Raises:
        SampleKeyError: no good sample has this key, or several have.
    """
    dataset = open_dataset(url, ["cls"])
    sample = dataset.sample(key, shard)
    row = int(sample["row"])
    yield f"sample    {key}, row {row}" + (f", class {int(sample['cls'])}" if "cls" in sample else "")
    if not store_attributes(url).get("complete"):
        return
    table = read_columns(partition_place(url, row // dataset.layout.rows_per_shard // UNITS_PER_SEGMENT))
    (record,) = table.filter(pc.equal(table["row"], row)).to_pylist()
    top, left, height, width = json.loads(record["transform"])["source_window"]
    yield f"shard     {record['shard']}, unit {record['unit']}"
    cut = (height, width) != (record["height"], record["width"])
    part = f", of which {height:g}x{width:g} from {top:g}, {left:g} (y, x) on" if cut else ""
    yield f"image     {record['height']}x{record['width']}{part}, to {dataset.layout.height}x{dataset.layout.width}"
    if record["flags"]:
        yield f"flags     {record['flags']}"
    if record["explained_variance"] is not None:
        yield f"fit       explains {record['explained_variance']:.3f} of the variance of held-out views"


def _number(dataset: FeatureDataset, key: str, shard: str | None) -> int:
    """The number in a dataset of the sample with a key."""
    return int(np.searchsorted(dataset.rows, int(dataset.sample(key, shard)["row"])))


def _beside(dataset: FeatureDataset) -> list[str]:
    """The arrays that are shown beside the features."""
    return ["image", *dataset.layout.labels]


def _panels(beside: FeatureDataset, number: int, colours: FeatureColours, height: int) -> list[Panel]:
    """Image, features and labels of a sample; the first is titled with its key."""
    sample = beside[number]
    title = sample["key"] + (f", class {int(sample['cls'])}" if "cls" in sample else "")
    panels = [(title, fitted(sample["image"].numpy(), height))] if "image" in sample else []
    cells, features = colours.with_cell_means(number)
    text = "{}x{} means".format(*colours.grid)
    panels.append((text if panels else f"{title}: {text}", fitted(cells, height, smooth=False)))
    panels.append(("features (PCA)", fitted(features, height)))
    if "seg" in sample:
        fill = label_spec("seg", beside.layout.seg_dtype).fill
        ids = sample["seg"].numpy()
        known = ids[ids != fill]
        panels.append(
            ("seg", fitted(class_colours(ids, class_palette(int(known.max(initial=-1)) + 1)), height, smooth=False))
        )
    if "depth" in sample:
        depth = sample["depth"].numpy()
        known = depth[np.isfinite(depth)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        text = f"depth {low:.1f} to {high:.1f} m" if known.size else "depth unknown"
        panels.append((text, fitted(value_colours(depth, low, high), height, smooth=False)))
    return panels


def fitted(pixels: Pixels, height: int, smooth: bool = True) -> Pixels:
    """A picture made smaller, by means of its pixels, where it is higher than ``height``."""
    if pixels.shape[0] <= height:
        return pixels
    width = max(1, round(pixels.shape[1] * height / pixels.shape[0]))
    resampling = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize((width, height), resampling))

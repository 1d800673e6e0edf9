"""What resembles a pixel: the cosine similarity of its feature with all pixels of its image and of others."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featup.pictures import sheet, side_by_side, value_colours
from pipeline.errors import ConfigError
from pipeline.loader import FeatureDataset
from pipeline.viewing.samples import feature_colours, fitted, open_dataset, spread, without_padding

__all__ = ["Neighbour", "similarity_picture"]

Pixels = NDArray[np.uint8]
# So many of the nearest images are shown.
_SHOWN = 5
_HEIGHT = 224


@dataclass(frozen=True, eq=False)
class Neighbour:
    """An image, and how similar its pixels are to the pixel that was asked for.

    ``similarity`` is the largest, at ``pixel`` (y, x); ``map`` float32 ``[H, W]``, -1 to 1, is that of all pixels, and
    NaN in padding.
    """

    number: int
    key: str
    similarity: float
    pixel: tuple[int, int]
    map: NDArray[np.float32]


def similarity_picture(
    url: str, key: str, pixel: tuple[int, int], count: int = 100, shard: str | None = None
) -> tuple[Pixels, list[Neighbour]]:
    """The similarity of a pixel's feature with all pixels of its image, and of the nearest others, as a picture.

    The cosine is that of the features as they are stored; principal components have no mean left.

    Args:
        url: the store.
        key: the sample's name.
        pixel: (y, x) in pixels of the stored features.
        count: the nearest are looked for among so many other images, spread evenly over the store.
        shard: the end of its input shard's URL, where several have a sample of this name.

    Returns:
        The picture, and the nearest images, the most similar first.

    Raises:
        ConfigError: the pixel lies outside of the image, or in its padding.
        SampleKeyError: no good sample has this key, or several have.
    """
    dataset = open_dataset(url)
    y, x = pixel
    size = (dataset.layout.height, dataset.layout.width)
    if not (0 <= y < size[0] and 0 <= x < size[1]):
        raise ConfigError(f"pixel {y},{x} (y, x) is not inside the features' {size[0]}x{size[1]} (height x width)")
    sample = dataset.sample(key, shard)
    own = int(np.searchsorted(dataset.rows, int(sample["row"])))
    features = without_padding(sample)
    query = features[y, x]
    if not query.isfinite().all():
        raise ConfigError(f"pixel {y},{x} (y, x) of {key} is padding; give one of the image")
    itself = Neighbour(own, key, 1.0, pixel, _cosine(features, query))
    others = [number for number in spread(count + 1, len(dataset)) if number != own][:count]
    nearest: list[Neighbour] = []
    for number in others:
        nearest = sorted([*nearest, _neighbour(dataset, number, query)], key=lambda one: -one.similarity)[:_SHOWN]
    return _picture(url, dataset, [itself, *nearest]), nearest


def _neighbour(dataset: FeatureDataset, number: int, query: Tensor) -> Neighbour:
    sample = dataset[number]
    similarities = _cosine(without_padding(sample), query)
    y, x = np.unravel_index(int(np.nanargmax(similarities)), similarities.shape)
    return Neighbour(number, sample["key"], float(similarities[y, x]), (int(y), int(x)), similarities)


def _cosine(features: Tensor, query: Tensor) -> NDArray[np.float32]:
    """Cosine of ``[H, W, C]`` with ``[C]``: float32 ``[H, W]``; 0 where a vector has no length."""
    lengths = torch.linalg.vector_norm(features, dim=-1) * torch.linalg.vector_norm(query)
    similarities: NDArray[np.float32] = ((features @ query) / lengths.clamp_min(1e-12)).numpy()
    return similarities


def _picture(url: str, dataset: FeatureDataset, images: list[Neighbour]) -> Pixels:
    """Each image with its pixel marked, above its similarity map; all maps on one scale."""
    numbers = [one.number for one in images]
    if any(spec.name == "image" for spec in dataset.layout.arrays):
        pictures = open_dataset(url, ["image"])
        views = [pictures[number]["image"].numpy() for number in numbers]
    else:
        views = feature_colours(dataset, numbers)
    low = float(np.nanpercentile(np.stack([one.map for one in images]), 1))
    columns = []
    for place, (one, view) in enumerate(zip(images, views, strict=True)):
        scale = max(1, _HEIGHT // view.shape[0])
        above = _marked(view, one.pixel, scale)
        below = _marked(value_colours(one.map, low, 1.0), one.pixel, scale)
        title = f"{one.key} at {one.pixel[0]},{one.pixel[1]}"
        text = f"similarity {low:.2f} to 1" if place == 0 else f"largest {one.similarity:.2f}"
        height = min(_HEIGHT, above.shape[0])
        lines = [(title, fitted(above, height)), (text, fitted(below, height))]
        columns.append(sheet([side_by_side([line], height) for line in lines]))
    return sheet(columns, len(columns))


def _marked(pixels: Pixels, pixel: tuple[int, int], scale: int) -> Pixels:
    """A picture enlarged, with a ring around a pixel, white on black so that it shows on any colour."""
    picture = pixels.repeat(scale, 0).repeat(scale, 1)
    y, x = np.ogrid[: picture.shape[0], : picture.shape[1]]
    distance = np.hypot(y - scale * (pixel[0] + 0.5), x - scale * (pixel[1] + 0.5))
    radius = picture.shape[0] / 28
    picture[np.abs(distance - radius) < radius / 2] = 0
    picture[np.abs(distance - radius) < radius / 4] = 255
    return picture

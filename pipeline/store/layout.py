"""Shapes, types and chunks of the store's arrays, the version of their format, and how they are opened."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from pipeline.decode.kinds import label_spec
from pipeline.errors import ConfigError, IncompleteStoreError, StoreError, StoreFormatError
from pipeline.inputs import storage
from pipeline.store.fields import read_fields
from pipeline.store.remote_arrays import RemoteArrays

__all__ = [
    "FAILED",
    "FORMAT",
    "FORMAT_VERSION",
    "NOTHING",
    "OK",
    "OLDEST_FORMAT_VERSION",
    "AnyArray",
    "ArraySpec",
    "Codec",
    "Layout",
    "finished_attributes",
    "list_differences",
    "open_arrays",
    "open_group",
    "read_attributes",
    "require_complete",
    "store_attributes",
    "stored_layout",
    "tile_of",
]

FORMAT = "featup-store"
# Raised with every change that an older program would misread. A newer program opens and finishes stores of all
# versions from the oldest on: what they do not have gets its default.
FORMAT_VERSION = 2
OLDEST_FORMAT_VERSION = 2
_FIRST_FORMAT = "featup-datasets/1"

AnyArray = zarr.Array[Any]
NOTHING, OK, FAILED = 0, 1, 2
Codec = Literal["lz4", "zstd", "none"]
# blosc's level for lz4: its highest speed beyond which chunks only get larger (benchmarks/README.md, "Compression").
_LZ4_LEVEL = 5
# A window of half the image's sides, or less, must not make a reader decode all of it; and a chunk of a few kilobytes
# takes longer to find than to decode.
_CHUNK_BYTES, _SMALL_CHUNK_BYTES = 640 << 10, 64 << 10
_TILES_PER_SIDE = 4


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store: shape of a row, chunk within a row, and what stands where nothing was written."""

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    chunk: tuple[int, ...]
    fill: float

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of a row in a shard: the row, rounded up to whole chunks."""
        return tuple(-(-side // chunk) * chunk for side, chunk in zip(self.row_shape, self.chunk, strict=True))

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions. A name has one length in the whole group, as xarray expects of it."""
        return ("row", "y", "x", "rgb" if self.name == "image" else "channel")[: 1 + len(self.row_shape)]


@dataclass(frozen=True)
class Layout:
    """Shapes, types and chunks of all arrays; the same for every worker. A field that is added needs a default."""

    rows: int
    rows_per_shard: int
    height: int
    width: int
    channels: int
    tile: tuple[int, int]
    labels: tuple[str, ...]
    seg_dtype: Literal["uint8", "uint16"]
    valid_mask: bool
    compression_level: int
    image: bool = False
    codec: Codec = "zstd"

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Layout":
        """The layout in a store's attributes, also of an older version: fields it does not have get their defaults.

        Raises:
            StoreFormatError: fields that this version does not have, or lacks.
        """
        return read_fields(Layout, values, "the store's layout")

    def to_dict(self) -> dict[str, Any]:
        """As kept in a store's attributes."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))

    def __post_init__(self) -> None:
        if self.rows % self.rows_per_shard:
            raise StoreError(
                f"{self.rows} rows are not whole shards of {self.rows_per_shard}: two workers would write to one "
                "shard and lose each other's rows; make rows a multiple of rows_per_shard"
            )

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every array, features first and status last."""
        size = (self.height, self.width)
        specs = [ArraySpec("features", "float16", (*size, self.channels), (*self.tile, self.channels), float("nan"))]
        if self.image:
            specs.append(ArraySpec("image", "uint8", (*size, 3), (*self.tile, 3), 0))
        for kind in self.labels:
            label = label_spec(kind, self.seg_dtype)
            shape = size if label.per_pixel else ()
            specs.append(ArraySpec(kind, label.dtype, shape, shape, label.fill))
        if self.valid_mask:
            specs.append(ArraySpec("valid", "uint8", size, size, 0))
        return (*specs, ArraySpec("status", "uint8", (), (), NOTHING))

    @property
    def blosc(self) -> tuple[Literal["lz4", "zstd"], int]:
        """Name and level of what blosc compresses with; at level 0 it copies."""
        if self.codec == "zstd":
            return "zstd", self.compression_level
        return "lz4", _LZ4_LEVEL if self.codec == "lz4" else 0

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample in all arrays, before compression."""
        return sum(spec.row_bytes for spec in self.arrays)


def tile_of(size: tuple[int, int], channels: int, wanted: int | None) -> tuple[int, int]:
    """(height, width) of a chunk, of tiles that are as good as equal.

    Args:
        size: (height, width) of an image of the store.
        channels: of its features, float16.
        wanted: pixels that a side has at most. By default a quarter of the image's side, in chunks of at most 640 KiB,
            rather of a length that divides the side.
    """

    def fitted(side: int) -> int:
        if wanted is not None:
            return -(-side // -(-side // wanted))
        least, most = (int((size / (2 * channels)) ** 0.5) for size in (_SMALL_CHUNK_BYTES, _CHUNK_BYTES))
        most = min(side, max(1, least, min(most, -(-side // _TILES_PER_SIDE))))
        # What does not divide the side is filled up at the border, and read in vain.
        even = max(length for length in range(1, most + 1) if side % length == 0)
        return even if 2 * even >= most else -(-side // -(-side // most))

    height, width = size
    return fitted(height), fitted(width)


def zarr_store(url: str, *, read_only: bool) -> ZarrStore:
    """The Zarr storage of ``OUT/features.zarr`` for a local path or an fsspec URL."""
    place = storage.join(url, "features.zarr")
    if storage.is_local(place):
        return LocalStore(storage.local_path(place), read_only=read_only)
    return RemoteArrays.at(place, read_only=read_only)


def read_attributes(url: str) -> dict[str, Any] | None:
    """The store's attributes, or ``None`` where there is no store.

    Raises:
        StoreError: there is a Zarr group that is not a feature store, or a group that cannot be read.
    """
    try:
        root = zarr.open_group(zarr_store(url, read_only=True), mode="r", zarr_format=3)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(
            f"{storage.join(url, 'features.zarr')} is not a Zarr group that can be read ({error}): its zarr.json is "
            "damaged, or not that of a feature store; restore it, or give another --out"
        ) from error
    attributes = dict(root.attrs)
    _check_format(storage.join(url, "features.zarr"), attributes)
    return attributes


def _check_format(place: str, attributes: Mapping[str, Any]) -> None:
    name, version = attributes.get("format"), attributes.get("format_version")
    if name == _FIRST_FORMAT:
        raise StoreFormatError(
            f"{place} was made before format {OLDEST_FORMAT_VERSION} (it is of {name}), which this program does not "
            "read; make it again with another --out"
        )
    if name != FORMAT:
        raise StoreError(f"{place} is a Zarr group and not a feature store; give another --out")
    if not isinstance(version, int) or version < OLDEST_FORMAT_VERSION:
        raise StoreFormatError(
            f"{place} is of format version {version!r}, this program reads {OLDEST_FORMAT_VERSION} to "
            f"{FORMAT_VERSION}; make it again with another --out"
        )
    if version > FORMAT_VERSION:
        raise StoreFormatError(
            f"{place} is of format version {version}, this program reads {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}: "
            "a newer program wrote it; update this one (pip install --upgrade featup-datasets)"
        )


def list_differences(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    owners: tuple[str, str] = ("the store", "this run"),
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """What a store has and what a run wants, or any two ``owners`` have, name by name, where it is not the same.

    Args:
        found: of the first owner.
        wanted: of the second.
        owners: how the text calls the two.
        defaults: what the first is taken to have of those names that only the second has: an option that the program
            that made the store did not know yet.
    """
    known = {name: value for name, value in (defaults or {}).items() if name in wanted}
    found = {**known, **found}
    return [
        f"{name}: {owners[0]} has {found.get(name)!r}, {owners[1]} has {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def finished_attributes(url: str) -> dict[str, Any] | None:
    """The attributes of a store that was created whole; ``None`` where there is none, or its creation was cut short."""
    attributes = read_attributes(url)
    return None if attributes is None or attributes.get("creating") else attributes


def open_group(url: str, *, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """The Zarr group of a store.

    Raises:
        StoreError: there is no store.
    """
    try:
        return zarr.open_group(zarr_store(url, read_only=mode == "r"), mode=mode, zarr_format=3)
    except FileNotFoundError as error:
        raise StoreError(
            f"no feature store at {url} (no group {storage.join(url, 'features.zarr')}); give the folder that was --out"
        ) from error


def open_arrays(url: str, names: Sequence[str], codecs: Literal["zarr", "zarrs"] = "zarr") -> dict[str, AnyArray]:
    """Arrays of a store, to read from.

    Args:
        codecs: ``zarr`` decodes in Python and checks every chunk; ``zarrs`` in Rust, faster, with threads that do not
            survive a fork, and checks chunks only where a whole shard is read at once and its tiles divide the image
            (zarrs 0.2.3): elsewhere what it reads must be held against the receipts' checksums.

    Raises:
        StoreError: there is no store.
        ConfigError: ``zarrs`` is not installed.
    """
    if codecs == "zarrs":
        try:
            import zarrs  # noqa: F401 - registers the pipeline
        except ModuleNotFoundError as error:
            raise ConfigError(
                "codecs='zarrs' needs the package zarrs, which is not installed; pip install 'featup-datasets[make]', "
                "or read with codecs='zarr'"
            ) from error

        settings: dict[str, Any] = {
            "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
            # Off by default there: a flipped bit would be read as data.
            "codec_pipeline.validate_checksums": True,
        }
    else:
        settings = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    with zarr.config.set(settings):
        group = open_group(url)
        return {name: cast(AnyArray, group[name]) for name in names}


def stored_layout(url: str) -> Layout:
    """The layout a store was created with, and has grown to since.

    Raises:
        StoreError: there is no store.
        StoreFormatError: it is of a format that this program does not read.
    """
    return Layout.from_dict(store_attributes(url)["layout"])


def store_attributes(url: str) -> dict[str, Any]:
    """The attributes of a store.

    Raises:
        StoreError: there is no store.
        StoreFormatError: it is of a format that this program does not read.
    """
    attributes = finished_attributes(url)
    if attributes is None:
        raise StoreError(f"no feature store at {url}; give the folder that was --out")
    return attributes


def require_complete(url: str, attributes: Mapping[str, Any]) -> None:
    """Refuse a store whose job has not ended.

    Raises:
        IncompleteStoreError: it is not complete.
    """
    if not attributes.get("complete"):
        raise IncompleteStoreError(
            f"{url} is not complete: the job that makes it has not ended, or is adding to it; run the job to its end, "
            "or give partial=True to read what is there"
        )

"""The feature store: Zarr v3 arrays whose shards are units of work.

Layout of a store ``OUT``::

    OUT/features.zarr/    a Zarr v3 group that plain ``zarr.open`` reads
        features          float16 [N, H, W, C], NaN where nothing was written
        seg depth cls     labels through the images' own transform, [N, H, W] or [N]
        valid             uint8 [N, H, W], 1 where the image is (geometry ``pad`` only)
        status            uint8 [N]: 0 nothing here, 1 ok, 2 failed
    OUT/index.parquet     a row per sample: key, input shard, status, reason, size, transform ...
    OUT/ledger/           a receipt per unit
    OUT/plan/             what was planned: shards, tar indices, the PCA

All arrays have the same rows, and shards of the same number of rows; a shard is one object, written whole by one
worker. Arrays are created with their full shape before any work begins. A chunk is a spatial tile of one image with
all of its channels.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import FsspecStore, LocalStore

from pipeline import storage
from pipeline.config import PrecomputeConfig, read_config
from pipeline.decode import label_spec
from pipeline.errors import StoreError, StoreMismatchError
from pipeline.plan import UnitKey
from pipeline.shard import encode_chunk, encode_shard

__all__ = [
    "FAILED",
    "NOTHING",
    "OK",
    "AnyArray",
    "ArraySpec",
    "Layout",
    "StoreWriter",
    "create_store",
    "feature_space",
    "finished_attributes",
    "list_differences",
    "open_arrays",
    "open_group",
    "read_attributes",
    "round_mantissa",
    "row_checksum",
    "stored_config",
    "stored_layout",
    "tile_of",
]

AnyArray = zarr.Array[Any]
NOTHING, OK, FAILED = 0, 1, 2
FORMAT = "featup-datasets/1"
_CHUNK_BYTES = 4 << 20
_CHECKSUM_BYTES = 1 << 18


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
        """Names of the dimensions."""
        return ("row", "y", "x", "channel")[: 1 + len(self.row_shape)]


@dataclass(frozen=True)
class Layout:
    """Shapes, types and chunks of all arrays; the same for every worker."""

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
        for kind in self.labels:
            label = label_spec(kind, self.seg_dtype)
            shape = size if label.per_pixel else ()
            specs.append(ArraySpec(kind, label.dtype, shape, shape, label.fill))
        if self.valid_mask:
            specs.append(ArraySpec("valid", "uint8", size, size, 0))
        return (*specs, ArraySpec("status", "uint8", (), (), NOTHING))

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample in all arrays, before compression."""
        return sum(spec.row_bytes for spec in self.arrays)


def tile_of(size: tuple[int, int], channels: int, wanted: int | None) -> tuple[int, int]:
    """(height, width) of a chunk: tiles that divide the image evenly, of at most 4 MiB or ``wanted`` pixels a side."""
    if wanted is None:
        wanted = max(1, int((_CHUNK_BYTES / (2 * channels)) ** 0.5))
    return cast(tuple[int, int], tuple(-(-side // -(-side // wanted)) for side in size))


def zarr_store(url: str, *, read_only: bool) -> ZarrStore:
    """The Zarr storage of ``OUT/features.zarr`` for a local path or an fsspec URL."""
    place = storage.join(url, "features.zarr")
    if storage.is_local(place):
        return LocalStore(storage.local_path(place), read_only=read_only)
    return FsspecStore.from_url(place, read_only=read_only)


def create_store(url: str, layout: Layout, attributes: Mapping[str, Any]) -> None:
    """Create all arrays with their full shape, or check that the store there was made for the same work.

    ``attributes["identity"]`` is what must be the same: every option, input and weight that decides what is written.
    A store whose creation was cut short holds nothing yet, and is created again.

    Raises:
        StoreMismatchError: there is a store, made with another identity; the text lists the differences.
        StoreError: there is something else, or a store that lost its attributes.
    """
    wanted = {"format": FORMAT, "layout": json.loads(json.dumps(asdict(layout))), **attributes}
    found = read_attributes(url)
    if found is not None and not found.get("creating"):
        differences = list_differences({"format": found["format"]}, {"format": FORMAT})
        for part in ("layout", "identity"):
            differences += list_differences(found.get(part, {}), wanted[part])
        if differences:
            raise StoreMismatchError(
                f"{url} was made with other settings:\n  " + "\n  ".join(differences) + "\n"
                "Finish it with the settings it was made with, or give another --out."
            )
        return
    place = storage.join(url, "features.zarr")
    if found is None and (files := storage.list_files(place)):
        raise StoreError(
            f"{place} holds {len(files)} files ({files[0]} ...) and no zarr.json of a Zarr v3 group: it belongs to "
            "something else, or is a store that lost that file, and creating a store would delete it; restore the "
            "file, remove the folder yourself, or give another --out"
        )
    store = zarr_store(url, read_only=False)
    root = zarr.create_group(store, overwrite=True, attributes={"format": FORMAT, "creating": True})
    for spec in layout.arrays:
        # Rows of one number each are chunked by the shard: thousands of one-byte chunks would help nobody.
        per_row = bool(spec.row_shape)
        root.create_array(
            spec.name,
            shape=(layout.rows, *spec.row_shape),
            dtype=spec.dtype,
            chunks=(1, *spec.chunk) if per_row else (layout.rows_per_shard,),
            shards=(layout.rows_per_shard, *spec.shard_shape) if per_row else None,
            compressors=[
                BloscCodec(
                    typesize=np.dtype(spec.dtype).itemsize,
                    cname="zstd",
                    clevel=layout.compression_level,
                    shuffle="bitshuffle",
                ),
                Crc32cCodec(),
            ],
            fill_value=spec.fill,
            dimension_names=spec.dims,
        )
    root.attrs.put(wanted)


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
    if "format" not in attributes:
        raise StoreError(
            f"{storage.join(url, 'features.zarr')} is a Zarr group and not a feature store; give another --out"
        )
    return attributes


def list_differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], owners: tuple[str, str] = ("the store", "this run")
) -> list[str]:
    """What a store has and what a run wants, or any two ``owners`` have, name by name, where it is not the same."""
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
    """
    if codecs == "zarrs":
        import zarrs  # noqa: F401 - registers the pipeline

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


def row_checksum(row: NDArray[Any]) -> int:
    """crc32c of one row's bytes, in C order, little-endian."""
    flat = row.reshape(-1).view(np.uint8)
    checksum = 0
    for start in range(0, len(flat), _CHECKSUM_BYTES):  # the library takes bytes alone: copies, so small ones
        checksum = google_crc32c.extend(checksum, flat[start : start + _CHECKSUM_BYTES].tobytes())
    return int(checksum)


def round_mantissa(block: NDArray[np.float16], bits: int) -> None:
    """Round float16 values, in place, to ``bits`` of their 10 mantissa bits, half to even; NaN and infinity stay.

    Values that would round beyond the largest number keep their bits. Decoding needs nothing; rounded values just
    compress better.
    """
    drop = 10 - bits
    if not drop:
        return
    raw = block.view(np.uint16)
    half = np.uint16((1 << (drop - 1)) - 1)
    odd = (raw >> np.uint16(drop)) & np.uint16(1)
    rounded = (raw + half + odd) & np.uint16(0xFFFF & ~((1 << drop) - 1))
    # Both: the payload of a NaN can carry into the sign, and a large number can round to infinity.
    finite = ((raw & np.uint16(0x7C00)) != 0x7C00) & ((rounded & np.uint16(0x7C00)) != 0x7C00)
    np.copyto(raw, rounded, where=finite)


class StoreWriter:
    """Writes whole units into an existing store."""

    def __init__(self, url: str, layout: Layout, threads: int = 1) -> None:
        """
        Args:
            threads: how many chunks are encoded at once.
        """
        self.url = url
        self.layout = layout
        self._arrays = open_arrays(url, [spec.name for spec in layout.arrays])
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def write(self, key: UnitKey, blocks: Mapping[str, NDArray[Any]]) -> int:
        """Write one unit, every object of it atomically, and make it durable.

        Args:
            key: the unit; its rows begin a shard.
            blocks: for every array ``[rows_per_shard, ...]``, fill values in rows that hold no sample.

        Returns:
            Bytes stored, after compression.

        Raises:
            StoreError: the blocks are not whole shards of this store.
        """
        rows = self.layout.rows_per_shard
        if key.row % rows or key.row >= self.layout.rows or set(blocks) != set(self._arrays):
            raise StoreError(
                f"{key}: writing {sorted(blocks)} at row {key.row}; a unit begins a shard of {rows} rows, below row "
                f"{self.layout.rows}, and has all of {sorted(self._arrays)}"
            )
        for spec in self.layout.arrays:
            block = blocks[spec.name]
            if block.shape != (rows, *spec.row_shape) or block.dtype != spec.dtype:
                raise StoreError(
                    f"{key}: {spec.name} is {block.dtype} {block.shape}, the store takes {spec.dtype} "
                    f"{(rows, *spec.row_shape)}"
                )
        stored = 0
        for spec in self.layout.arrays:
            block, array = blocks[spec.name], self._arrays[spec.name]
            place = storage.join(self.url, "features.zarr", spec.name, chunk_key(array, key.row // rows))
            # Rows of one number each are one chunk, which is encoded like a chunk of a shard and stands alone.
            if spec.row_shape:
                parts = encode_shard(block, spec.chunk, spec.fill, self.layout.compression_level, self._pool)
            else:
                parts = encode_chunk(block, spec.fill, self.layout.compression_level)
            if parts:
                storage.write_atomic(place, *parts)
                stored += sum(map(len, parts))
            else:
                storage.remove(place)
        return stored


def chunk_key(array: AnyArray, shard: int) -> str:
    """Name of the object that holds shard ``shard`` of an array's rows, below the array."""
    encoding = cast(Any, array.metadata).chunk_key_encoding
    return cast(str, encoding.encode_chunk_key((shard,) + (0,) * (array.ndim - 1)))


def stored_layout(url: str) -> Layout:
    """The layout a store was created with.

    Raises:
        StoreError: there is no store.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in _attributes(url)["layout"].items()
    }
    return Layout(**values)


def stored_config(url: str) -> tuple[PrecomputeConfig, dict[str, Any]]:
    """The config a store was made with, and the setup (see ``pipeline.featurize.Setup``) as plain values."""
    attributes = _attributes(url)
    return read_config(PrecomputeConfig, attributes["config"]), attributes["setup"]


def feature_space(config: PrecomputeConfig, setup: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which features a backbone gives: where these are the same, one PCA or one probe serves both.

    Args:
        config: A store's, or a run's.
        setup: That of the same, see ``pipeline.featurize.Setup``, as plain values.
    """
    return {
        "backbone": f"{config.backbone}, layer {setup['layer']}",
        "backbone digest": setup["digests"]["backbone"],
        "backbone_kwargs": config.backbone_kwargs,
        "norm": config.norm,
        "mean": tuple(setup["mean"]),
        "std": tuple(setup["std"]),
    }


def _attributes(url: str) -> dict[str, Any]:
    attributes = finished_attributes(url)
    if attributes is None:
        raise StoreError(f"no feature store at {url}; give the folder that was --out")
    return attributes

"""The feature store: Zarr v3 arrays whose shards are units of work.

Layout of a store ``OUT``::

    OUT/features.zarr/    a Zarr v3 group that plain ``zarr.open`` reads
        features          float16 [N, H, W, C], NaN where nothing was written
        image             uint8 [N, H, W, 3], the image on the features' pixels
        seg depth cls     labels through the images' own transform, [N, H, W] or [N]
        valid             uint8 [N, H, W], 1 where the image is (geometry ``pad`` only)
        status            uint8 [N]: 0 nothing here, 1 ok, 2 failed
    OUT/index/            a row per sample: key, input shard, status, reason, size, transform ...; parquet, a file for
                          each thousand units
    OUT/ledger/           a receipt per unit, in files of a thousand where that many are there
    OUT/plan/             what was planned: shards, tar indices, the PCA

All arrays have the same rows, and shards of the same number of rows; a shard is one object, written whole by one
worker. Arrays are created with their full shape before any work begins. A chunk is a spatial tile of one image with
all of its channels.

The attribute ``complete`` is written last, after the index, and withdrawn before anything changes.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from pipeline.errors import StoreError, StoreMismatchError
from pipeline.inputs import storage
from pipeline.store.layout import (
    FORMAT,
    FORMAT_VERSION,
    Layout,
    list_differences,
    read_attributes,
    store_attributes,
    stored_layout,
    zarr_store,
)

__all__ = ["create_store", "declare_complete", "grow_store", "withdraw_complete"]


_CREATING = {"format": FORMAT, "format_version": FORMAT_VERSION, "creating": True}


def create_store(
    url: str, layout: Layout, attributes: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Create all arrays with their full shape, or check that the store there was made for the same work.

    ``attributes["identity"]`` is what must be the same: every option and weight that decides what is written. How many
    rows there are may differ: :func:`grow_store` brings a store to the rows of a plan. A store whose creation was cut
    short holds nothing yet, and is created again.

    Args:
        url: of the store.
        layout: of all arrays.
        attributes: to store beside the layout.
        defaults: options of the identity with what they are where a store does not know them.

    Raises:
        StoreMismatchError: there is a store, made with another identity; the text lists the differences.
        StoreError: there is something else, or a store that lost its attributes.
    """
    found = read_attributes(url)
    if found is not None and not found.get("creating"):
        differences = _layout_differences(Layout.from_dict(found["layout"]), layout)
        differences += list_differences(found.get("identity", {}), attributes["identity"], defaults=defaults)
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
    codec, level = layout.blosc
    root = zarr.create_group(store, overwrite=True, attributes=_CREATING)
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
                    cname=codec,
                    clevel=level,
                    shuffle="bitshuffle",
                ),
                Crc32cCodec(),
            ],
            fill_value=spec.fill,
            dimension_names=spec.dims,
        )
        _sync(storage.join(place, spec.name, "zarr.json"))
    created = {"format": FORMAT, "format_version": FORMAT_VERSION, "complete": False, "layout": layout.to_dict()}
    _rewrite(storage.join(place, "zarr.json"), lambda group: group.update(attributes={**created, **attributes}))


def grow_store(url: str, layout: Layout) -> None:
    """Make all arrays as long as ``layout`` says; a store that is that long already is left as it is.

    The rows that are there stay. The store is not complete from then on. Growing that was cut short is done again.

    Raises:
        StoreMismatchError: the layout has fewer rows than the store, or differs in anything else.
    """
    stored = stored_layout(url)
    differences = _layout_differences(stored, layout)
    if layout.rows < stored.rows:
        differences.append(f"rows: the store has {stored.rows}, this run has {layout.rows}; a store never shrinks")
    if differences:
        raise StoreMismatchError(f"{url} cannot grow to this run's layout: {'; '.join(differences)}")
    if layout.rows == stored.rows:
        return
    withdraw_complete(url)

    def lengthen(array: dict[str, Any]) -> None:
        array["shape"][0] = layout.rows

    for spec in layout.arrays:
        _rewrite(storage.join(url, "features.zarr", spec.name, "zarr.json"), lengthen)
    _set_attributes(url, layout=layout.to_dict())


def withdraw_complete(url: str) -> None:
    """Mark, durably, that a store is not complete, before anything in it changes.

    A store of an older version of the format is of this one from then on.

    Raises:
        StoreError: there is no store.
    """
    attributes = store_attributes(url)
    if attributes.get("complete") or attributes["format_version"] != FORMAT_VERSION:
        _set_attributes(url, complete=False, format_version=FORMAT_VERSION)


def declare_complete(url: str) -> None:
    """Mark that a store is complete; the last thing a job does, after the index.

    Raises:
        StoreError: there is no store.
    """
    if not store_attributes(url).get("complete"):
        _set_attributes(url, complete=True)


def _layout_differences(stored: Layout, layout: Layout) -> list[str]:
    """Differences of two layouts in anything but the number of rows."""
    found, wanted = stored.to_dict(), layout.to_dict()
    return list_differences(found, {**wanted, "rows": found["rows"]})


def _set_attributes(url: str, **changes: Any) -> None:
    place = storage.join(url, "features.zarr", "zarr.json")
    _rewrite(place, lambda group: group["attributes"].update(changes))


def _rewrite(place: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change Zarr metadata, atomically and durably (zarr-python syncs nothing), in zarr-python's own style."""
    metadata = json.loads(storage.read_bytes(place))
    change(metadata)
    storage.write_atomic(place, json.dumps(metadata, indent=2).encode())


def _sync(place: str) -> None:
    if storage.is_local(place):
        storage.sync_file(place)
        storage.sync_file(place.rpartition("/")[0])

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
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from pipeline.errors import StoreError, StoreMismatchError
from pipeline.inputs import storage
from pipeline.store.layout import Layout, list_differences, read_attributes, zarr_store

__all__ = ["create_store"]


FORMAT = "featup-datasets/1"


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

"""What happens once, before the first unit: the plan, the models' facts, the PCA, and the store's creation."""

import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import yaml

from featup.checkpoints import pca_bytes
from pipeline.compute.device import set_threads
from pipeline.compute.models import Extractor, Setup, fit_pca, pca_place, take_pca
from pipeline.config.base import InputConfig, describe
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import StoreMismatchError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard, make_plan, rows_of
from pipeline.store.create import create_store
from pipeline.store.layout import Layout, finished_attributes, list_differences, tile_of

__all__ = ["complete_plan", "create_all", "layout_of", "plan_input", "prepare", "versions"]


def plan_input(config: InputConfig, index_all: Any = None) -> tuple[PlannedShard, ...]:
    """Index the input shards; the indices are kept in ``OUT/plan/index``."""
    index_dir = storage.join(config.out, "plan", "index")
    storage.make_dirs(index_dir)
    return make_plan(config.shards, index_dir, config.limit, index_all)


def prepare(config: PrecomputeConfig, shards: tuple[PlannedShard, ...]) -> Setup:
    """Build the models once, learn their geometry and digests, and fit the PCA (or take this store's or another's).

    Raises:
        ConfigError: the PCA of ``pca_from`` is of other features.
        StoreError: there is no store at ``pca_from``, or it has no PCA.
    """
    set_threads(config.threads, config.actors)
    extractor = Extractor(config)
    setup = extractor.setup()
    found = finished_attributes(config.out)
    if config.pca_from is not None:
        pca, data = take_pca(config.pca_from, config, setup)
    elif config.pca is None:
        return setup
    elif found is not None:
        digests = setup.digests | {"pca": found["identity"]["pca digest"]}
        return replace(setup, channels=config.pca, digests=digests)
    else:
        plan = Plan(shards, 1, storage.join(config.out, "plan", "index"))
        pca = fit_pca(extractor, plan, config.pca, config.pca_images)
        data = pca_bytes(pca, backbone=config.backbone, layer=setup.layer, weights=setup.digests["backbone"])
    if found is None:
        # Of a store that is there the PCA stays: whether this is the same, its digest says before anything runs.
        storage.write_atomic(pca_place(config.out), data)
    return setup.with_pca(pca, data)


def layout_of(config: PrecomputeConfig, rows_per_shard: int, channels: int, units: int) -> Layout:
    """The store's layout."""
    size = config.target_size
    return Layout(
        rows=units * rows_per_shard,
        rows_per_shard=rows_per_shard,
        height=size.height,
        width=size.width,
        channels=channels,
        tile=tile_of(size, channels, config.tile),
        labels=config.labels,
        seg_dtype=config.seg_dtype,
        valid_mask=config.geometry == "pad",
        compression_level=config.compression_level,
    )


def complete_plan(config: PrecomputeConfig, shards: tuple[PlannedShard, ...], channels: int) -> Plan:
    """The plan, once the number of stored channels tells how many images make a Zarr shard."""
    rows = rows_of(layout_of(config, 1, channels, 1).sample_bytes, config.rows_per_shard)
    return Plan(shards, rows, storage.join(config.out, "plan", "index"))


def check_options(config: PrecomputeConfig) -> None:
    """Refuse another run's store before anything in it is touched."""
    found = finished_attributes(config.out)
    if found is None:
        return
    wanted = config.identity()
    differences = list_differences({name: found["identity"].get(name) for name in wanted}, wanted)
    if differences:
        raise StoreMismatchError(
            f"{config.out} was made with other options:\n  " + "\n  ".join(differences) + "\n"
            "Finish it with the options it was made with, or give another --out."
        )


def create_all(config: PrecomputeConfig, plan: Plan, layout: Layout, setup: Setup) -> None:
    """Create the store, or check that the one there is this run's; keep plan and config beside it.

    Raises:
        StoreMismatchError: it was made with other options, input or weights; the text lists the differences.
    """
    place = storage.join(config.out, "plan", "plan.json")
    identity = config.identity() | {f"{name} digest": value for name, value in setup.digests.items()}
    identity |= {"input shards": len(plan.shards), "input samples": plan.samples, "input digest": plan.digest}
    provenance = {
        "identity": identity,
        "config": describe(config),
        "setup": asdict(setup),
        "versions": versions(),
    }
    try:
        create_store(config.out, layout, provenance)
    except StoreMismatchError as error:
        if storage.exists(place):
            old = Plan.from_json(storage.read_bytes(place), plan.index_dir)
            changed = [
                f"{now.url}: {was.size} bytes, {was.used} samples then; {now.size} bytes, {now.used} samples now"
                for was, now in zip(old.shards, plan.shards, strict=False)
                if (was.url, was.size, was.used) != (now.url, now.size, now.used)
            ]
            if changed:
                raise StoreMismatchError(f"{error}\nInput that changed:\n  " + "\n  ".join(changed[:10])) from error
        raise
    storage.write_atomic(place, plan.to_json())
    storage.write_atomic(
        storage.join(config.out, "plan", "config.yaml"),
        yaml.safe_dump(describe(config), sort_keys=False).encode(),
    )


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what comes out."""
    packages = ("torch", "timm", "ray", "zarr", "numpy", "numba", "pillow", "simplejpeg", "featup-datasets")
    return {"python": sys.version.split()[0], **{name: version(name) for name in packages}}

"""What happens once, before the first unit: the plan, the models' facts, the PCA, and the store's creation."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from featup.checkpoints import pca_bytes
from pipeline.compute.device import set_threads
from pipeline.compute.models import Extractor, Setup, fit_pca, keep_weights, take_pca, weights_place
from pipeline.config.base import InputConfig, describe, options_since
from pipeline.config.precompute import PrecomputeConfig
from pipeline.decode.kinds import LABEL_EXTENSIONS, label_spec
from pipeline.errors import ConfigError, Reason, StoreMismatchError
from pipeline.inputs import storage
from pipeline.inputs.images import list_images
from pipeline.inputs.manifest import FOLDER, is_manifest
from pipeline.inputs.manifest_update import update_manifests
from pipeline.inputs.patterns import expand
from pipeline.inputs.plan import IndexAll, Plan, PlannedShard, rows_of
from pipeline.inputs.plan_update import PlanUpdate, update_plan
from pipeline.redaction import redact
from pipeline.store.create import create_store, grow_store, withdraw_complete
from pipeline.store.index import read_index
from pipeline.store.layout import Layout, finished_attributes, list_differences, tile_of
from pipeline.store.ledger import Ledger
from pipeline.store.provenance import pca_place

__all__ = [
    "as_stored",
    "check_members",
    "check_options",
    "complete_plan",
    "create_or_grow",
    "layout_of",
    "load_models",
    "plan_input",
    "plan_store",
    "prepare",
    "units_to_retry",
    "versions",
]

# Options, by their names or what these begin with, and the upsamplers that read them; ``fit_base`` was once an option.
_OPTIONS_OF: tuple[tuple[tuple[str, ...], set[str]], ...] = (
    (("sigma_", "feature_components", "same_resolution_stages"), {"bilateral", "implicit"}),
    (("fit_", "implicit_preset"), {"implicit", "multiview"}),
    (("view", "held_out_views", "back_projection"), {"multiview"}),
)


def plan_input(
    config: InputConfig, index_all: IndexAll | None = None, folder: str | None = None
) -> tuple[PlannedShard, ...]:
    """Index the input shards; the indices are kept in ``OUT/plan/index``.

    Args:
        config: names them.
        index_all: indexes many shards at once.
        folder: where lists of images are written; by default beside the indices, which is for who holds the lease.
    """
    urls = _urls(config, folder or storage.join(config.out, "plan", FOLDER))
    return update_plan(None, urls, _index_dir(config.out), config.limit, index_all).shards


def plan_store(config: PrecomputeConfig, old: Plan | None, index_all: IndexAll | None = None) -> PlanUpdate:
    """The plan of a store's input as it is now: that of before, with what is new behind it.

    Raises:
        InputChangedError: a shard has other content than the store was made from.
        InputError: nothing matches, no shard holds a sample, or one that the store was made from is gone.
    """
    kept = [shard.url.rpartition("/")[2] for shard in old.shards if is_manifest(shard.url)] if old else []
    urls = _urls(config, storage.join(config.out, "plan", FOLDER), kept)
    return update_plan(old, urls, _index_dir(config.out), config.limit, index_all)


def _urls(config: InputConfig, folder: str, kept: Sequence[str] = ()) -> list[str]:
    """The shards; of images the manifests in ``folder``, of which a store was made from those that are ``kept``."""
    if not config.images:
        return expand(config.shards)
    label_dirs = dict(text.split("=", 1) for text in getattr(config, "label_dir", ()))
    listed = list_images(
        config.images,
        config.image_exts,
        LABEL_EXTENSIONS,
        label_dirs,
        every=config.every,
        image_column=config.image_column,
        label_columns=getattr(config, "labels", ()),
        cache_dir=_index_dir(config.out),
    )
    return update_manifests(folder, listed, kept)


def check_members(config: PrecomputeConfig, shards: tuple[PlannedShard, ...]) -> None:
    """Refuse input whose samples have no image, or not one label of a kind, before anything is computed.

    The first input shard that holds samples is looked at.

    Raises:
        ConfigError: the text says which members the samples have.
    """
    plan = Plan(shards, 1, _index_dir(config.out))
    samples = plan.index(plan.sample(0)[0]).samples
    present = Counter(member.ext for sample in samples for member in sample.members)
    wanted = {"image": config.image_exts} | {
        f"{kind} label": label_spec(kind, config.seg_dtype).extensions for kind in config.labels
    }
    for what, extensions in wanted.items():
        if not any(present[ext] for ext in extensions):
            there = ", ".join(f"{count} .{ext}" for ext, count in present.most_common(5))
            raise ConfigError(
                f"not one of the {len(samples)} samples of {redact(shards[plan.sample(0)[0]].url)} has a {what} "
                f"({', '.join(extensions)}); they have {there}. Leave the label out, or name the files as members of "
                "their sample (KEY.seg.png); with --images give --label-dir"
            )


def load_models(config: PrecomputeConfig) -> Extractor:
    """Build the models once, of weights that are kept with the store where they are downloaded.

    Raises:
        ConfigError: a GPU is asked for and there is none, or more components than the backbone has channels.
        FeatupError: a model, layer, size or checkpoint that does not fit.
    """
    # Nothing else runs yet.
    set_threads(config.threads, 1)
    extractor = Extractor(config, weights=keep_weights(config))
    if config.pca is not None and config.pca > extractor.channels:
        raise ConfigError(
            f"pca={config.pca} and {config.backbone} gives {extractor.channels} channels at layer "
            f"{extractor.backbone.layer}; give at most that, or no pca for all channels"
        )
    return extractor


def prepare(config: PrecomputeConfig, shards: tuple[PlannedShard, ...], extractor: Extractor) -> Setup:
    """Learn the models' geometry and digests, and fit the PCA (or take this store's or another's).

    Args:
        config: every option.
        shards: of the plan.
        extractor: from :func:`load_models`.

    Raises:
        ConfigError: the PCA of ``pca_from`` is of other features.
        StoreError: there is no store at ``pca_from``, or it has no PCA.
    """
    set_threads(config.threads, 1)
    setup = extractor.setup()
    existing = finished_attributes(config.out)
    if config.pca_from is not None:
        pca, data = take_pca(config.pca_from, config, setup)
    elif config.pca is None:
        return setup
    elif existing is not None:
        digests = setup.digests | {"pca": existing["identity"]["pca digest"]}
        return replace(setup, channels=config.pca, digests=digests)
    else:
        plan = Plan(shards, 1, _index_dir(config.out))
        pca = fit_pca(extractor, plan, config.pca, config.pca_images)
        data = pca_bytes(pca, backbone=config.backbone, layer=setup.layer, weights=setup.digests["backbone"])
    if existing is None:
        # Of a store that is there the PCA stays: whether this is the same, its digest says before anything runs.
        storage.write_atomic(pca_place(config.out), data)
    return setup.with_pca(pca, data)


def layout_of(config: PrecomputeConfig, rows_per_shard: int, channels: int, units: int) -> Layout:
    """The store's layout. The tiles of one that is there stay, where the run does not ask for others."""
    size = config.target_size
    stored = finished_attributes(config.out) if config.tile is None else None
    return Layout(
        rows=units * rows_per_shard,
        rows_per_shard=rows_per_shard,
        height=size.height,
        width=size.width,
        channels=channels,
        tile=Layout.from_dict(stored["layout"]).tile if stored else tile_of(size, channels, config.tile),
        labels=config.labels,
        seg_dtype=config.seg_dtype,
        valid_mask=config.geometry == "pad",
        compression_level=config.compression_level,
        image=config.store_image,
        codec=config.codec,
    )


def complete_plan(config: PrecomputeConfig, shards: tuple[PlannedShard, ...], channels: int) -> Plan:
    """The plan, once the number of stored channels tells how many images make a Zarr shard."""
    layout = layout_of(config, 1, channels, 1)
    decoded = 3 * max(config.size.height * config.size.width, layout.height * layout.width)
    beside = sum(spec.row_bytes for spec in layout.arrays[1:])
    rows = rows_of(layout.sample_bytes, config.rows_per_shard, decoded + beside)
    return Plan(shards, rows, _index_dir(config.out))


def as_stored(config: PrecomputeConfig, report: Callable[[str], object]) -> PrecomputeConfig:
    """The config a run goes on with where ``config.out`` holds a store that was made before there were some options.

    Such a store is finished as it was begun, whatever those options are by default now.

    Args:
        config: every option.
        report: gets a line for each option that is not as ``config`` has it.

    Raises:
        ConfigError: a level of compression for a codec that has one only.
    """
    existing = finished_attributes(config.out)
    if existing is None:
        return _with_one_level(config)
    changes = {
        name: value
        for name, value in options_since(config).items()
        if name not in existing["identity"] and getattr(config, name) != value
    }
    for name, value in changes.items():
        report(f"{config.out} was made before there was the option {name}, and goes on as it is: {name}={value}")
    return _with_one_level(replace(config, **changes))


def _with_one_level(config: PrecomputeConfig) -> PrecomputeConfig:
    if config.codec != "zstd" and config.compression_level != 1:
        raise ConfigError(
            f"compression_level={config.compression_level} is of zstd, and codec={config.codec!r} has one level; give "
            "--codec zstd with it"
        )
    return config


def check_options(config: PrecomputeConfig) -> None:
    """Refuse another run's store before anything in it is touched."""
    existing = finished_attributes(config.out)
    if existing is not None:
        options = config.identity()
        _refuse(config.out, {name: value for name, value in existing["identity"].items() if name in options}, options)


def create_or_grow(config: PrecomputeConfig, plan: Plan, layout: Layout, setup: Setup) -> None:
    """Create the store, or check that the one there is this run's and make it as long as the plan.

    Plan and config are kept beside it: the plan before the arrays, so that arrays never hold rows of shards that no
    plan names.

    Raises:
        StoreMismatchError: it was made with other options or weights; the text lists the differences.
    """
    identity = config.identity() | {f"{name} digest": value for name, value in setup.digests.items()}
    existing = finished_attributes(config.out)
    if existing is not None:
        _refuse(config.out, existing["identity"], identity)
        # Compared by what decides here; the store keeps what it was made with.
        identity = existing["identity"]
        if layout.rows > existing["layout"]["rows"]:
            withdraw_complete(config.out)
    # What a run was asked to try again is no property of the store.
    described = describe(replace(config, retry_failed=None))
    provenance = {
        "identity": identity,
        "config": described,
        "setup": asdict(setup),
        "versions": versions(),
        "plan_files": _plan_files(config),
    }
    storage.write_atomic(_plan_place(config.out), plan.to_json())
    create_store(config.out, layout, provenance, _defaults())
    grow_store(config.out, layout)
    storage.write_atomic(
        storage.join(config.out, "plan", "config.yaml"),
        yaml.safe_dump(described, sort_keys=False).encode(),
    )


def units_to_retry(config: PrecomputeConfig, plan: Plan, ledger: Ledger) -> list[int]:
    """Units that are done and hold failed samples, of the reasons that ``retry_failed`` names (all, if none)."""
    attributes = finished_attributes(config.out)
    if attributes is None:
        return []
    reasons = set(config.retry_failed or Reason)
    if attributes.get("complete"):
        table = read_index(config.out, ["unit", "status", "reason"])
        failed = pc.and_(pc.equal(table["status"], "failed"), pc.is_in(table["reason"], pa.array(sorted(reasons))))
        return sorted(set(table.filter(failed)["unit"].to_pylist()))
    done = ledger.done()
    keys = ((key, plan.shards[key.shard].digest) for key in map(plan.unit, range(plan.units)) if key.unit in done)
    return [
        key.unit
        for key, receipt in ledger.receipts(keys)
        if receipt is not None and any(record.reason in reasons for record in receipt.samples)
    ]


def _refuse(out: str, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = list_differences(_deciding(stored), _deciding(wanted), defaults=_defaults())
    if differences:
        raise StoreMismatchError(
            f"{out} was made with other settings: {'; '.join(differences)}. Finish it with the settings it was made "
            "with, or give another --out"
        )


def _deciding(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without the options of upsamplers that it does not use: their defaults may change."""
    used = {identity.get("upsampler")}
    if "multiview" in used:
        used.add(identity.get("view_base"))
    return {
        name: value
        for name, value in identity.items()
        if all(used & users for options, users in _OPTIONS_OF if name.startswith(options))
    }


def _defaults() -> dict[str, Any]:
    """Options that decide what is written, as a store that does not know them is taken to have been made with."""
    return PrecomputeConfig(shards=("-",), out="-", **options_since(PrecomputeConfig)).identity()


def _plan_files(config: PrecomputeConfig) -> dict[str, str]:
    """sha256 of the files beside the plan, by name, that decide what is written (the PCA's is in the identity)."""
    place = weights_place(config)
    return {} if place is None else {"backbone.safetensors": hashlib.sha256(storage.read_bytes(place)).hexdigest()}


def _index_dir(out: str) -> str:
    return storage.join(out, "plan", "index")


def _plan_place(out: str) -> str:
    return storage.join(out, "plan", "plan.json")


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what comes out."""
    packages = ("torch", "timm", "ray", "zarr", "numpy", "numba", "pillow", "simplejpeg", "featup-datasets")
    return {"python": sys.version.split()[0], **{name: version(name) for name in packages}}

"""What a store was made with, held against the digests it recorded."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from featup.checkpoints import load_pca
from featup.projection import PCA
from pipeline.config.base import RETIRED, BackboneConfig, describe, read_config
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import StoreError, StoreFormatError
from pipeline.inputs import storage
from pipeline.redaction import redact
from pipeline.store.layout import require_complete, store_attributes

__all__ = [
    "check_plan_files",
    "describe_features",
    "feature_space",
    "pca_place",
    "read_features",
    "stored_config",
    "stored_file",
    "stored_pca",
    "weights_place",
]

PCA_FILE = "pca.safetensors"
# The groups of the options that decide which features an image gets.
_FEATURE_GROUPS = ("backbone", "decoding", "upsampler")


def stored_config(url: str, partial: bool = False) -> tuple[PrecomputeConfig, dict[str, Any]]:
    """The config a store was made with, and the setup (see ``pipeline.compute.models.Setup``) as plain values.

    Options that the program that made the store did not know are as things were done before there were these options.

    Args:
        url: the store.
        partial: serve a store that is not complete as well.

    Raises:
        StoreError: there is no store.
        IncompleteStoreError: it is not complete.
        StoreFormatError: options that this program does not know.
    """
    attributes = store_attributes(url)
    if not partial:
        require_complete(url, attributes)
    values = attributes["config"]
    unknown = sorted(values.keys() - {one.name for one in fields(PrecomputeConfig)} - RETIRED)
    if unknown:
        raise StoreFormatError(
            f"{url} was made with the options {unknown}, which this program does not know: a newer program made it; "
            "update this one"
        )
    return read_config(PrecomputeConfig, values), attributes["setup"]


def feature_space(config: PrecomputeConfig, setup: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which features a backbone gives: where these are the same, one PCA or one probe serves both.

    Args:
        config: A store's, or a run's.
        setup: That of the same, see ``pipeline.compute.models.Setup``, as plain values.
    """
    return {
        "backbone": f"{config.backbone}, layer {setup['layer']}",
        "backbone digest": setup["digests"]["backbone"],
        "backbone_kwargs": config.backbone_kwargs,
        "norm": config.norm,
        "mean": tuple(setup["mean"]),
        "std": tuple(setup["std"]),
    }


def describe_features(url: str) -> dict[str, Any]:
    """How a store's features are computed from an image, but for its PCA, as plain values without credentials.

    Returns:
        ``options``: those of ``featup precompute`` that decide the features, with layer, mean and std as they were
        resolved; ``setup``: the models' facts, see ``pipeline.compute.models.Setup``, among them the digests of weights
        and checkpoint; ``weights``, ``checkpoint``: where these files were, ``None`` where there is none;
        ``weights_kept``: where the store keeps the weights that timm downloaded for it.

    Raises:
        StoreError: there is no store.
        IncompleteStoreError: it is not complete.
    """
    config, setup = stored_config(url)
    place = os.path.abspath(storage.local_path(url)) if storage.is_local(url) else url
    kept = weights_place(replace(config, out=place))
    resolved = replace(
        config, layer=setup["layer"], stride=None, mean=tuple(setup["mean"]), std=tuple(setup["std"]), labels=()
    )
    values = describe(resolved)
    metadata = {one.name: one.metadata for one in fields(config)}
    options = [name for name, of in metadata.items() if of["group"] in _FEATURE_GROUPS and not of["run"]]
    return {
        "options": {name: values[name] for name in options},
        "setup": dict(setup),
        "weights": values["weights"],
        "checkpoint": values["checkpoint"],
        "weights_kept": kept and redact(kept),
    }


def read_features(features: Mapping[str, Any], pca: PCA | None, checkpoint: str | None) -> PrecomputeConfig:
    """The config that gives an image the features that :func:`describe_features` describes.

    Args:
        features: from there.
        pca: the store's; ``None`` where it holds all channels.
        checkpoint: where the upsampler's is; ``None`` where it has none.

    Raises:
        StoreFormatError: options that this program does not know, or an upsampler that it no longer has.
    """
    if features["options"].get("upsampler") == "implicit" and "fit_base" in features["options"]:
        raise StoreFormatError(
            "made by the implicit upsampler of an older program, an average of views that is now multiview and gives "
            "other features; make the store again with --upsampler multiview, and train the probe on it"
        )
    values = {**features["options"], "checkpoint": checkpoint, "pca": None if pca is None else len(pca.components)}
    return read_config(PrecomputeConfig, {**values, "shards": ["-"], "out": "-"})


def weights_place(config: BackboneConfig) -> str | None:
    """Where a store keeps the weights that timm downloaded for it; ``None`` where nothing is downloaded."""
    downloads = config.pretrained and config.weights is None
    return storage.join(config.out, "plan", "backbone.safetensors") if downloads else None


def pca_place(store: str) -> str:
    """Where a store keeps its PCA."""
    return storage.join(store, "plan", PCA_FILE)


def stored_pca(url: str) -> tuple[PCA, bytes]:
    """A store's PCA and its file's bytes, whose digest is the one that the store was made with.

    Raises:
        StoreError: there is no store, it holds all channels, or its PCA is gone or was replaced.
        WeightsError: the file is not one that this project wrote.
    """
    if PCA_FILE not in _recorded_digests(store_attributes(url)):
        raise StoreError(f"{url} holds all channels and no PCA; leave pca_from out, or give a store made with --pca")
    data = stored_file(url, PCA_FILE)
    # From a copy: the file that is loaded is the one whose digest was compared.
    with tempfile.TemporaryDirectory(prefix="featup-") as folder:
        path = os.path.join(folder, PCA_FILE)
        with open(path, "wb") as file:
            file.write(data)
        return load_pca(path), data


def stored_file(url: str, name: str) -> bytes:
    """The bytes of ``OUT/plan/NAME``, held against the digest in the store's attributes.

    Raises:
        StoreError: there is no store or no such file, no digest was recorded, or the file has another.
    """
    recorded = _recorded_digests(store_attributes(url)).get(name)
    place = storage.join(url, "plan", name)
    if recorded is None:
        raise StoreError(f"{url} has no digest of {place}: it was made without this file; give another store")
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError as error:
        raise StoreError(f"{place} is gone, and {url} was made with it (sha256 {recorded}); restore it") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != recorded:
        raise StoreError(
            f"{place} has sha256 {digest}, and {url} was made with {recorded}: the file was replaced or is damaged; "
            "restore it"
        )
    return data


def check_plan_files(url: str) -> Iterator[str]:
    """What is wrong with the files in ``OUT/plan`` whose digests a store recorded."""
    for name in _recorded_digests(store_attributes(url)):
        try:
            stored_file(url, name)
        except (StoreError, OSError) as error:
            yield str(error)


def _recorded_digests(attributes: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of files in ``OUT/plan``, by name: those of the attribute ``plan_files``, and the PCA of the identity."""
    digests: dict[str, str] = dict(attributes.get("plan_files", {}))
    pca = attributes.get("identity", {}).get("pca digest")
    return digests if pca is None else {**digests, PCA_FILE: pca}

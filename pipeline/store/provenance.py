"""What a store was made with."""

from collections.abc import Mapping
from typing import Any

from pipeline.config.base import read_config
from pipeline.config.precompute import PrecomputeConfig
from pipeline.store.layout import attributes_of

__all__ = ["feature_space", "stored_config"]


def stored_config(url: str) -> tuple[PrecomputeConfig, dict[str, Any]]:
    """The config a store was made with, and the setup (see ``pipeline.featurize.Setup``) as plain values."""
    attributes = attributes_of(url)
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

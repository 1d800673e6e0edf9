"""timm's models by name, and what is known of their weights."""

import difflib
from collections.abc import Mapping
from typing import Any

import safetensors

from featup._timm import timm
from featup.aliases import BACKBONE_ALIASES, REFUSED_NAMES
from featup.errors import GeometryError, WeightsError

__all__ = ["classifier_names", "create_model", "download_model", "unused_names"]


def create_model(name: str, arguments: Mapping[str, Any], pretrained: bool = False) -> Any:
    """timm's model, refused with what to give where there is none, or none with maps."""
    if not timm.is_model(name):
        raise GeometryError(_unknown(name))
    try:
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise GeometryError(
            f"timm cannot create {name} with arguments {dict(arguments)}: {str(error).rstrip('.')}. Likely "
            "cause: an argument or size this model does not take, or a tag it does not have; correct or omit it"
        ) from error
    if not hasattr(model, "forward_intermediates"):
        raise GeometryError(
            f"{name} ({type(model).__name__}) has no intermediate maps in timm {timm.__version__}: it lacks "
            "forward_intermediates; choose another model, or a newer timm"
        )
    return model


def download_model(name: str, arguments: Mapping[str, Any]) -> Any:
    """timm's model with timm's own weights, from the hub or its cache."""
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        cfg = timm.get_pretrained_cfg(name)
        source = (cfg and (cfg.hf_hub_id or cfg.url or cfg.file)) or "none known to timm"
        raise WeightsError(
            f"timm could not get pretrained weights of {name} (source: {source}): "
            f"{' '.join(str(error).split())[:300]}. Likely cause: no network here, or no such weights for "
            "these arguments. Fetch the file where there is a network, and give weights=FILE instead"
        ) from error


def classifier_names(model: Any) -> tuple[str, ...]:
    """Names of the modules that make classes of a model's features."""
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def unused_names(sketch: Any, layer: int, final_norm: bool) -> set[str]:
    """Names of the weights that a map does not depend on: those that timm removes from a model for this map alone."""
    whole: set[str] = set(sketch.state_dict())
    sketch.prune_intermediate_layers([layer], prune_norm=not final_norm, prune_head=True)
    return whole.difference(sketch.state_dict())


def _unknown(name: str) -> str:
    """The text for a name that is neither timm's nor an alias, with the nearest names that are."""
    if advice := REFUSED_NAMES.get(name.lower()):
        return f"{name!r} names no single timm model: {advice}"
    # Aliases by their lower case, because they are resolved in any case.
    names = {alias.lower(): alias for alias in BACKBONE_ALIASES} | {model: model for model in timm.list_models()}
    near = difflib.get_close_matches(name.split(".")[0].lower(), names, n=5)
    return f"timm {timm.__version__} has no model {name!r}; " + (
        f"the nearest names are {', '.join(names[key] for key in near)}"
        if near
        else "featup.list_backbones() lists all names"
    )

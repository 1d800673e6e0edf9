"""Checkpoints of what this project trains or fits: safetensors with a JSON description in the metadata.

Also reads the JBU stack out of official FeatUp ``.ckpt`` files.
"""

import json
import re
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from featup.errors import WeightsError
from featup.projection import PCA
from featup.upsamplers.jbu import JBU
from featup.weights import load_state_dict, load_strict

__all__ = ["load_jbu", "load_pca", "pca_bytes", "save_jbu"]

_FORMAT = "featup-datasets/1"
_OFFICIAL_STAGE = {
    "range_proj.0": "range_in",
    "range_proj.3": "range_out",
    "fixup_proj.0": "fixup_in",
    "fixup_proj.3": "fixup_out",
}


def _pack(kind: str, description: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    text = json.dumps({"format": _FORMAT, "kind": kind, **description}, sort_keys=True)
    packed: bytes = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"featup": text}
    )
    return packed


def _unpack(path: Path, kind: str, fields: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("featup")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); write it again") from error
    try:
        description: dict[str, Any] = dict(json.loads(text or "{}"))
    except (ValueError, TypeError) as error:
        raise WeightsError(
            f"{path}: its description is not a JSON object ({error}); give a file that this project saved as a {kind}"
        ) from error
    if description.get("format") != _FORMAT or description.get("kind") != kind:
        raise WeightsError(
            f"{path}: expected a {kind} in format {_FORMAT}, found kind={description.get('kind')!r} "
            f"format={description.get('format')!r}; give a file that this project saved as a {kind}"
        )
    lacking = [name for name in fields if name not in description]
    if lacking:
        raise WeightsError(f"{path}: its description lacks {', '.join(lacking)}; save the {kind} again")
    return description, tensors


def pca_bytes(pca: PCA, **provenance: Any) -> bytes:
    """A PCA as the content of a safetensors file; the keyword arguments go into its description."""
    description = {"explained": pca.explained, "count": pca.count, "provenance": provenance}
    return _pack("pca", description, {"components": pca.components, "mean": pca.mean, "variance": pca.variance})


def load_pca(path: str | Path) -> PCA:
    """Read what :func:`pca_bytes` made.

    Raises:
        WeightsError: the file is damaged or holds something else.
    """
    description, tensors = _unpack(Path(path), "pca", ("explained", "count"))
    return PCA(**tensors, explained=description["explained"], count=description["count"])


def save_jbu(jbu: JBU, path: str | Path, **provenance: Any) -> None:
    """Save a JBU stack; the keyword arguments (backbone, layer, data, steps ...) go into its description."""
    description = {
        "channels": jbu.channels,
        "stages": len(jbu.stages),
        "key_dim": jbu.key_dim,
        "radius": jbu.radius,
        "guidance_mean": jbu.guidance_mean,
        "guidance_std": jbu.guidance_std,
        "provenance": provenance,
    }
    Path(path).write_bytes(_pack("jbu", description, jbu.state_dict()))


def load_jbu(path: str | Path) -> JBU:
    """A JBU stack from our safetensors checkpoint or from an official FeatUp ``.ckpt``.

    The official layout is recognised by its keys (``upsampler.up1.range_temp`` ...), with or without the prefix; its
    guidance is normalised with the ImageNet mean and standard deviation.

    Raises:
        WeightsError: the file is damaged, holds something else, or its shapes do not fit together.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        names = ("channels", "stages", "key_dim", "radius", "guidance_mean", "guidance_std")
        description, tensors = _unpack(path, "jbu", names)
        jbu = JBU(**{name: description[name] for name in names})
    else:
        tensors = _from_official(load_state_dict(path), path)
        taps = tensors["stages.0.fixup_out.bias"].numel()
        window = isqrt(taps)
        if window**2 != taps or window < 3 or window % 2 == 0:
            raise WeightsError(
                f"{path}: its first stage corrects {taps} taps, which is no square window with an odd side of at "
                "least 3; give an official FeatUp JBU checkpoint or one that this project trained"
            )
        jbu = JBU(
            channels=tensors["fixup.bias"].numel(),
            stages=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("stages.")),
            key_dim=tensors["stages.0.range_in.bias"].numel(),
            radius=window // 2,
        )
    load_strict(jbu, tensors, str(path))
    return jbu.eval().requires_grad_(False)


def _from_official(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Official names and 1x1-convolution shapes to ours; whatever else the file holds (the backbone) is left."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(?:upsampler\.)?up(\d+)\.(.+)", name)
        if found:
            part = found[2]
            layer, _, leaf = part.rpartition(".")
            part = f"{_OFFICIAL_STAGE[layer]}.{leaf}" if layer in _OFFICIAL_STAGE else part
            ours[f"stages.{int(found[1]) - 1}.{part}"] = tensor
        elif (found := re.fullmatch(r"(?:upsampler\.)?fixup_proj\.1\.(weight|bias)", name)) is not None:
            ours[f"fixup.{found[1]}"] = tensor
    needed = ("stages.0.range_in.bias", "stages.0.fixup_out.bias", "fixup.bias")
    if any(name not in ours for name in needed):
        raise WeightsError(
            f"{path}: no JBU stack in it; expected keys like 'upsampler.up1.range_temp' and "
            f"'upsampler.fixup_proj.1.weight', found {sorted(state)[:5]}; give an official FeatUp JBU checkpoint "
            "or one that this project trained"
        )
    return {
        name: t[:, :, 0, 0] if t.dim() == 4 else t for name, t in ((n, torch.as_tensor(t)) for n, t in ours.items())
    }

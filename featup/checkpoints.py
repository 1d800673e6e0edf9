"""Checkpoints of PCAs, probes and trained upsamplers: safetensors files with a JSON description in the metadata.

The JBU stack can also be read from official FeatUp ``.ckpt`` files, and AnyUp from official state dicts.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from featup.errors import GeometryError, WeightsError
from featup.evaluation.probes import Probe
from featup.projection import PCA
from featup.upsamplers.anyup import AnyUp
from featup.upsamplers.base import ChannelMap, Upsampler
from featup.upsamplers.carafe import CARAFE
from featup.upsamplers.ifa import IFA
from featup.upsamplers.jbu import JBU
from featup.upsamplers.resize_conv import ResizeConv
from featup.upsamplers.sapa import SAPA
from featup.weights import load_state_dict, load_strict

if TYPE_CHECKING:
    from featup.backbones import Backbone

__all__ = [
    "CHECKPOINT_FORMAT",
    "ProbeFile",
    "check_backbone",
    "load_anyup",
    "load_jbu",
    "load_pca",
    "load_probe",
    "load_upsampler",
    "pca_bytes",
    "probe_bytes",
    "read_probe",
    "read_provenance",
    "upsampler_bytes",
]

CHECKPOINT_FORMAT = "featup-datasets/1"
"""Format name in the description of every file that this project trains or fits."""


def _same_names(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# The trainable upsamplers: the class, and its constructor arguments by their names in the description of a file. The
# attributes are called like the arguments, but the attribute ``stages`` is the module list itself.
_TRAINABLE: dict[str, tuple[type[Upsampler], dict[str, str]]] = {
    "jbu": (JBU, _same_names("channels", "stages", "key_dim", "radius", "guidance_mean", "guidance_std")),
    "resize_conv": (ResizeConv, _same_names("channels", "stages", "width")),
    "carafe": (CARAFE, _same_names("channels", "stages", "width")),
    "sapa": (SAPA, _same_names("channels", "stages", "width", "key_dim")),
    "ifa": (IFA, _same_names("channels", "width")),
    "anyup": (AnyUp, _same_names("width")),
}
# What the names of a PCA's tensors begin with in the file of a probe.
_PCA = "pca."
_OFFICIAL_STAGE = {
    "range_proj.0": "range_in",
    "range_proj.3": "range_out",
    "fixup_proj.0": "fixup_in",
    "fixup_proj.3": "fixup_out",
}


def _pack(kind: str, description: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    text = json.dumps({"format": CHECKPOINT_FORMAT, "kind": kind, **description}, sort_keys=True)
    packed: bytes = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"featup": text}
    )
    return packed


def _unpack(path: Path, kind: str, fields: Iterable[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    if description.get("format") != CHECKPOINT_FORMAT or description.get("kind") != kind:
        raise WeightsError(
            f"{path}: expected a {kind} in format {CHECKPOINT_FORMAT}, found kind={description.get('kind')!r} "
            f"format={description.get('format')!r}; give a file that this project saved as a {kind}"
        )
    lacking = [name for name in fields if name not in description]
    if lacking:
        raise WeightsError(f"{path}: its description lacks {', '.join(lacking)}; save the {kind} again")
    return description, tensors


def pca_bytes(pca: PCA, **provenance: Any) -> bytes:
    """A PCA as the content of a safetensors file; the keyword arguments go into its description."""
    facts, tensors = _pca_parts(pca)
    return _pack("pca", {**facts, "provenance": provenance}, tensors)


def load_pca(path: str | Path) -> PCA:
    """Read a PCA that :func:`pca_bytes` wrote.

    Raises:
        WeightsError: the file is damaged or holds something else.
    """
    return _pca_of(*_unpack(Path(path), "pca", ("explained", "count")))


def _pca_parts(pca: PCA) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {"components": pca.components, "mean": pca.mean, "variance": pca.variance}
    return {"explained": pca.explained_variance_ratio, "count": pca.count}, tensors


def _pca_of(facts: dict[str, Any], tensors: dict[str, Tensor]) -> PCA:
    return PCA(**tensors, explained_variance_ratio=facts["explained"], count=facts["count"])


@dataclass(frozen=True, eq=False)
class ProbeFile:
    """What the file of a probe holds.

    Attributes:
        probe: The fitted probe.
        pca: What the features it takes were projected by; ``None`` where it takes all channels.
        provenance: What it was fitted on, as given to :func:`probe_bytes`.
    """

    probe: Probe
    pca: PCA | None
    provenance: dict[str, Any]


def probe_bytes(probe: Probe, pca: PCA | None = None, **provenance: Any) -> bytes:
    """A probe as the content of a safetensors file; the keyword arguments go into its description.

    Args:
        probe: A fitted probe.
        pca: What the features it was fitted on were projected by; ``None`` for all channels.
        provenance: ``backbone`` as for :func:`upsampler_bytes`, the seed, where the features come from.
    """
    facts, tensors = (None, {}) if pca is None else _pca_parts(pca)
    description = {
        "label": probe.kind,
        "channels": probe.channel_map.weight.shape[1],
        "outputs": len(probe.channel_map.bias),
        "weight_decay": probe.weight_decay,
        "held_out": list(probe.held_out.items()),
        "vectors": probe.vectors,
        "pca": facts,
        "provenance": provenance,
    }
    packed = {"weight": probe.channel_map.weight, "bias": probe.channel_map.bias}
    return _pack("probe", description, packed | {f"{_PCA}{name}": tensor for name, tensor in tensors.items()})


def read_probe(path: str | Path) -> ProbeFile:
    """Read all that a file of :func:`probe_bytes` holds.

    Raises:
        WeightsError: the file is damaged or holds something else.
    """
    description, tensors = _unpack(Path(path), "probe", ("label", "weight_decay", "held_out", "vectors"))
    facts = description.get("pca")
    of_pca = {name.removeprefix(_PCA): tensor for name, tensor in tensors.items() if name.startswith(_PCA)}
    probe = Probe(
        kind=description["label"],
        channel_map=ChannelMap(tensors["weight"], tensors["bias"]),
        weight_decay=description["weight_decay"],
        held_out={decay: loss for decay, loss in description["held_out"]},
        vectors=description["vectors"],
    )
    return ProbeFile(probe, None if facts is None else _pca_of(facts, of_pca), description.get("provenance", {}))


def load_probe(path: str | Path) -> Probe:
    """Read a probe that :func:`probe_bytes` wrote, without what it was fitted on; see :func:`read_probe`.

    Raises:
        WeightsError: the file is damaged or holds something else.
    """
    return read_probe(path).probe


def upsampler_bytes(upsampler: Upsampler, **provenance: Any) -> bytes:
    """A trained upsampler as the content of a safetensors file.

    Args:
        upsampler: From :func:`featup.upsamplers.create_trainable`.
        provenance: Goes into the description. :func:`check_backbone` compares ``backbone``, a dictionary of the
            ``name``, ``layer``, ``norm`` and ``digest`` of the backbone that the upsampler was trained for.
    """
    description: dict[str, Any] = {"provenance": provenance}
    for name, argument in _TRAINABLE[upsampler.name][1].items():
        value = getattr(upsampler, argument)
        description[name] = len(value) if isinstance(value, nn.ModuleList) else value
    return _pack(upsampler.name, description, upsampler.state_dict())


def load_upsampler(path: str | Path, name: str) -> Upsampler:
    """Read the upsampler ``name`` from a file of :func:`upsampler_bytes`, or ``jbu`` or ``anyup`` from official ones.

    Raises:
        WeightsError: the file is damaged, holds something else, or its shapes do not fit together.
    """
    path = Path(path)
    if name == "jbu" and path.suffix != ".safetensors":
        return load_jbu(path)
    if name == "anyup":
        return load_anyup(path)
    upsampler_class, arguments = _TRAINABLE[name]
    description, tensors = _unpack(path, name, arguments)
    if description.get("kernel", "projection") != "projection":
        raise WeightsError(
            f"{path}: a JBU with kernel={description['kernel']!r}, which is not the paper's and is not made any more. "
            "It is the filter now called 'bilateral' (with features), which needs no checkpoint: use that upsampler, "
            "or train a jbu for this backbone"
        )
    upsampler = upsampler_class(**{argument: description[name] for name, argument in arguments.items()})
    load_strict(upsampler, tensors, str(path))
    return upsampler.eval().requires_grad_(False)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What a file of this project says of its making; empty where it says nothing, or is of another project."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        provenance: dict[str, Any] = json.loads((file.metadata() or {}).get("featup", "{}")).get("provenance", {})
    return provenance


def check_backbone(path: str | Path, backbone: "Backbone") -> None:
    """Refuse a checkpoint or a PCA that was made for other features; files that name no backbone pass.

    Raises:
        WeightsError: the weights, the layer or, where the file records it, the norm differ; the text names both.
    """
    provenance = read_provenance(path)
    trained = provenance.get("backbone")
    if isinstance(trained, str) and {"layer", "weights"} <= provenance.keys():  # A PCA's.
        trained = {"name": trained, "layer": provenance["layer"], "digest": provenance["weights"]}
    if not isinstance(trained, dict):
        return
    norm = trained.get("norm")
    same_norm = norm is None or norm == backbone.norm
    if same_norm and (trained["digest"], trained["layer"]) == (backbone.digest, backbone.layer):
        return
    raise WeightsError(
        f"{path} was made for {trained['name']}, layer {trained['layer']}, norm {norm or 'not recorded'}, with "
        f"weights {trained['digest'][:12]}...; the backbone is {backbone.name}, layer {backbone.layer}, norm "
        f"{backbone.norm}, with weights {backbone.digest[:12]}.... Give the backbone, layer and norm it was made "
        "for, or train or fit one for these"
    )


def load_anyup(path: str | Path) -> AnyUp:
    """Read AnyUp from an official state dict, pickled or as safetensors; it serves features of any channels.

    Raises:
        WeightsError: the file is damaged, holds something else, or its shapes do not fit together.
    """
    state = load_state_dict(path)
    first = state.get("image_encoder.0.weight")
    if first is None or first.dim() != 4:
        raise WeightsError(
            f"{path}: no AnyUp in it; expected keys like 'image_encoder.0.weight' [width, 3, 1, 1], found "
            f"{sorted(state)[:5]}; give an official AnyUp checkpoint such as anyup_multi_backbone.pth"
        )
    try:
        anyup = AnyUp(first.shape[0])
    except GeometryError as error:
        raise WeightsError(f"{path}: not the weights of an AnyUp ({error}); give an official checkpoint") from error
    load_strict(anyup, state, str(path))
    return anyup.eval().requires_grad_(False)


def load_jbu(path: str | Path) -> JBU:
    """Read a JBU stack from our safetensors checkpoint or from an official FeatUp ``.ckpt``.

    The official layout is recognised by its keys (``upsampler.up1.range_temp`` ...), with or without the prefix; its
    guidance is normalised with the ImageNet mean and standard deviation.

    Raises:
        WeightsError: the file is damaged, holds something else, or its shapes do not fit together.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        loaded = load_upsampler(path, "jbu")
        assert isinstance(loaded, JBU)
        return loaded
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
    """Official names and 1x1-convolution shapes to ours; other tensors in the file, the backbone's, are ignored."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if stage := re.fullmatch(r"(?:upsampler\.)?up(\d+)\.(.+)", name):
            part = stage[2]
            layer, _, leaf = part.rpartition(".")
            part = f"{_OFFICIAL_STAGE[layer]}.{leaf}" if layer in _OFFICIAL_STAGE else part
            ours[f"stages.{int(stage[1]) - 1}.{part}"] = tensor
        elif fixup := re.fullmatch(r"(?:upsampler\.)?fixup_proj\.1\.(weight|bias)", name):
            ours[f"fixup.{fixup[1]}"] = tensor
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

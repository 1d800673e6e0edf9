"""Weights in local files: reading, strict loading, and digests."""

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from featup.errors import WeightsError

__all__ = ["file_digest", "load_state_dict", "load_strict", "state_digest", "under"]

_PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Averaged weights come first: training runs report the quality of these. DINO's and DINOv2's teachers are the published
# networks; DeepSpeed writes "module" (BEiT, EVA), and I-JEPA's "encoder" is the one that timm takes.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "module", "encoder")
_WRAPPERS = ("module.", "_orig_mod.")
# Exceptions of torch.load on damaged files and on files of another format.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
_LISTED = 8


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file, on the CPU, in the file's dtypes.

    ``.safetensors`` files are read as they are. ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` and ``.tar`` files are unpickled
    with ``weights_only=True``, so that no code in them is executed; ``argparse.Namespace``, which training scripts
    store beside the weights, is the only class allowed besides torch's own. The nesting of training scripts is removed
    (``state_dict_ema``, ``model_ema``, ``state_dict``, ``model``, ``teacher``, ``student``, ``module``, ``encoder``:
    the first of these keys, repeatedly), and so are the prefixes ``module.`` and ``_orig_mod.`` if every key has them.

    Raises FileNotFoundError for a missing file, and WeightsError for a file that is damaged, has another suffix, needs
    code to be read (other pickled classes, TorchScript), or holds anything but named tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise WeightsError(_unreadable(path, "safetensors", error)) from error
    if path.suffix not in _PICKLED:
        raise WeightsError(
            f"{path}: a file that ends in {path.suffix!r} is not read as weights; "
            f"give a file that ends in .safetensors or {', '.join(_PICKLED)}"
        )
    if _is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript archive, a program with weights, and its code is not run here. If you trust its "
            f"source, save its weights alone: state = torch.jit.load({path.name!r}, map_location='cpu')"
            ".state_dict(); safetensors.torch.save_file({name: value.clone() for name, value in state.items()}, "
            "'weights.safetensors'). OpenAI's CLIP is also to be had from timm, without a file: see "
            "featup.list_backbones('openai')"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if classes := _pickled_classes(path, error):
            raise WeightsError(
                f"{path}: not only tensors, also pickled objects of {', '.join(classes[:_LISTED])}, whose code would "
                "have to be run to read them (torch.load refuses it with weights_only=True). If you trust where the "
                "file comes from, open it once with torch.load(FILE, weights_only=False), and save its state dict "
                "alone with safetensors.torch.save_file"
            ) from error
        raise WeightsError(_unreadable(path, "torch.save with weights_only=True", error)) from error
    return _named_tensors(content, path)


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str, ignore: Collection[str] = ()) -> None:
    """Load ``state`` into ``module``, all of it or nothing, cast to the module's dtypes.

    Every parameter and persistent buffer must be given, with its shape, and nothing else may be. Two kinds of keys are
    excepted, and are loaded only if they fit: keys that equal or lie under a prefix of ``ignore`` (``"head"`` covers
    ``head.weight``), and buffers that the module computes for itself, which older versions of a library saved.

    ``source`` is named in the error. Raises WeightsError with the keys that are missing, unexpected, or of another
    shape or kind; the module is then unchanged.
    """
    expected: dict[str, Tensor] = module.state_dict()
    computed = {name for name, _ in module.named_buffers()} - expected.keys()

    misfits = {
        key: f"{key} {_describe(value)} for {_describe(expected[key])}"
        for key, value in state.items()
        if key in expected
        and (value.shape != expected[key].shape or value.is_floating_point() != expected[key].is_floating_point())
    }
    missing = [key for key in expected if key not in state and not under(key, ignore)]
    known = expected.keys() | computed
    unexpected = [key for key in state if key not in known and not under(key, ignore)]
    misfitting = [text for key, text in misfits.items() if not under(key, ignore)]
    if missing or unexpected or misfitting:
        if not expected.keys() & state.keys():
            cause = "weights of another architecture, or of another library's version of it"
        elif not missing and not unexpected:
            cause = "the same architecture with another width, patch size or input size"
        else:
            cause = "another variant of the architecture, or other arguments at its creation"
        raise WeightsError(
            f"{source} does not fit {type(module).__name__}"
            + _listing("missing from it", missing)
            + _listing("unexpected in it", unexpected)
            + _listing("of another shape or kind (its own for the model's)", misfitting)
            + f". Likely cause: {cause}. Give the model name and arguments these weights were saved with."
        )
    fitting = {key: value for key, value in state.items() if key in expected and key not in misfits}
    module.load_state_dict(expected | fitting)


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in lower-case hexadecimal. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_digest(state: Mapping[str, Tensor], ignore: Collection[str] = ()) -> str:
    """The SHA-256 of the keys, dtypes, shapes and bytes of a state dict, in lower-case hexadecimal.

    The order of the keys and the tensors' devices and strides make no difference. Keys that equal or lie under a prefix
    of ``ignore`` are left out.
    """
    digest = hashlib.sha256()
    for key in sorted(key for key in state if not under(key, ignore)):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def _pickled_classes(path: Path, error: Exception) -> list[str]:
    """The classes and functions that only running code could restore; none for a file that is damaged."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (*_UNREADABLE, OSError):
        # Files of before torch 1.6, which are no archives; the refusal names the first.
        return re.findall(r"GLOBAL (\S+)", str(error))


def under(key: str, prefixes: Collection[str]) -> bool:
    """Whether a key equals one of the prefixes or lies under it: ``head`` covers ``head.weight``."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping) and (
        nested := [content[key] for key in _NESTS if isinstance(content.get(key), Mapping)]
    ):
        content = nested[0]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{path}: holds {'an empty' if isinstance(content, Mapping) else 'a'} {type(content).__name__}, "
            "not named tensors. Likely cause: something else was saved; save module.state_dict()"
        )
    others = [
        f"{key!r} ({type(value).__name__})"
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others:
        raise WeightsError(
            f"{path}: not only named tensors{_listing('also there', others)}. Likely cause: a training "
            f"checkpoint that nests its weights under none of {', '.join(_NESTS)}; save the state dict alone"
        )
    state = dict(content)
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _listing(title: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"; {title} ({len(items)}): {', '.join(items[:_LISTED])}{more}" if items else ""


def _unreadable(path: Path, way: str, error: Exception) -> str:
    return (
        f"{path}: cannot be read by {way}: {' '.join(str(error).split())[:300] or type(error).__name__}. "
        f"Likely cause: a download that was cut off (the file has {path.stat().st_size} bytes), a Git LFS "
        "pointer, or a web page. Fetch the file again, or save its state dict alone as safetensors"
    )

"""A backbone's weights from a local file: with timm's names, or with the authors' own, which timm converts."""

import contextlib
import inspect
import io
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featup._timm import timm
from featup.errors import WeightsError
from featup.weights import load_state_dict, load_strict, under

__all__ = ["Convert", "create_for_weights", "load_backbone_weights"]

Convert = Callable[..., Mapping[str, Tensor]]
"""timm's conversion of published weights for a model: of (state dict) or (state dict, model)."""

# Parts of published checkpoints that no map depends on, by the first component of their names: classifiers and
# projections after the network, decoders, text towers, and what only pretraining used.
_BESIDE = re.compile(
    r"((dist|aux|lm|dino|ibot)_)?head(s|_\w+)?|fc|fc_norm|classifier|attn_pool|pooler|pre_logits|mask_token|"
    r"(decoder|projector|predictor|prototypes|text|logit)\w*"
)
# Where training code keeps the backbone among other modules.
_PREFIXES = ("teacher.backbone.", "student.backbone.", "backbone.")
# Names of Hugging Face's transformers.
_TRANSFORMERS = re.compile(r"(^|\.)(embeddings|encoder\.layers?\.\d+|layer\.\d+\.attention)\.")
# What timm's conversions raise for a state dict of another kind than they expect.
_UNFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# timm resamples patch embeddings of another patch size to the model's, by these names.
_PATCHES = re.compile(r"(^|\.)(patch_embed\.(proj|projection)|patchifier\.proj|visual\.conv1)\.weight$")
_QKV_BIAS = re.compile(r"blocks\.\d+\.attn\.qkv\.bias$")
_NPZ_BLOCK = re.compile(r"(?:^|/)(encoderblock_\d+|MixerBlock_\d+|block\d+/unit\d+)/")

_builder_lock = threading.Lock()


def create_for_weights(create: Callable[[], Any]) -> tuple[Any, Convert | None]:
    """A timm model as for its pretrained weights, and timm's conversion of published weights to the model's names.

    timm hands the conversion from a model's constructor to the loading of pretrained weights, and keeps it nowhere. So
    the model is created with ``pretrained=True``, and instead of loading anything the conversion is noted. A few
    models also have other constants with pretrained weights, such as the epsilon of their batch norms.

    Args:
        create: Calls ``timm.create_model`` with ``pretrained=True``.

    Returns:
        The model, with random weights, and the conversion; ``None`` for a model whose published weights need none.
    """
    builder: Any = timm.models._builder
    thread = threading.get_ident()
    noted: list[Convert | None] = [None]
    with _builder_lock:
        original = builder.load_pretrained

        def note(*args: Any, filter_fn: Convert | None = None, **kwargs: Any) -> None:
            if threading.get_ident() != thread:  # Another thread's model gets its weights as ever.
                original(*args, filter_fn=filter_fn, **kwargs)
            noted.append(filter_fn)

        builder.load_pretrained = note
        try:
            model = create()
        finally:
            builder.load_pretrained = original
    return model, noted[-1]


def load_backbone_weights(
    model: Any,
    path: str | Path,
    *,
    convert: Convert | None,
    classifier: Collection[str],
    unused: Collection[str] = (),
    patch_size_given: bool = False,
) -> tuple[str, ...]:
    """Load a local file into a timm model on the CPU, strictly as far as the features need it.

    The file may have timm's names, or those of the authors' published checkpoints that timm converts to its own: DINO,
    DINOv2, DINOv3, CLIP, SigLIP, MAE, DeiT, Swin, ConvNeXt, BEiT, EVA and others, and Google's ``.npz`` files for the
    models that timm reads those for. Position embeddings of another image size are resampled as timm does it.

    Classifiers, decoders, text towers and what only pretraining used may be in the file or not. Every other weight of
    the model must be there, with its shape, save those in ``unused``, and nothing else may be.

    Args:
        model: From :func:`create_for_weights`. After an error its weights are of no use.
        path: See ``featup.weights.load_state_dict`` for the kinds of files; ``.npz`` besides.
        convert: From :func:`create_for_weights`.
        classifier: Names of the model's classifier, exactly or as prefixes.
        unused: Names of weights that the asked map does not depend on.
        patch_size_given: Whether the user chose the model's patch size, so that timm may resample the file's.

    Returns:
        The names of the model's weights, exactly or as prefixes, that need not come from the file: its classifier, and
        those of ``unused`` that are not there.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: a file that cannot be read or does not fit; the text lists the names.
    """
    optional = {*classifier, *unused}
    if Path(path).suffix == ".npz":
        return _load_npz(model, Path(path), classifier, unused, patch_size_given)
    source = str(path)
    state: Mapping[str, Tensor] = load_state_dict(path)
    if not _fits(model, state, optional):
        original = state = _backbone_of(state)
        if convert is not None and not _fits(model, state, optional):
            state = _converted(model, state, convert, source)
            if _fits(model, state, optional):
                _refuse_changes(model, original, state, source, patch_size_given)
        if not _fits(model, state, optional):
            _refuse_transformers(model, original, source)
    expected = model.state_dict().keys()
    fitting = {key: value for key, value in state.items() if key in expected or not _beside(key)}
    absent = [key for key in expected if key not in fitting and under(key, unused)]
    load_strict(model, fitting, source, ignore=(*classifier, *absent))
    return (*classifier, *absent)


def _fits(model: nn.Module, state: Mapping[str, Tensor], optional: Collection[str]) -> bool:
    """Whether all names and shapes are the model's, but for what may be absent or is beside the features."""
    expected = model.state_dict()
    known = expected.keys() | {name for name, _ in model.named_buffers()}
    return all(key in state or under(key, optional) for key in expected) and all(
        key not in expected or value.shape == expected[key].shape if key in known else _beside(key)
        for key, value in state.items()
        if not under(key, optional)
    )


def _beside(key: str) -> bool:
    return _BESIDE.fullmatch(key.split(".")[0]) is not None


def _backbone_of(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for prefix in _PREFIXES:
        if below := {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}:
            return below
    return state


def _converted(model: nn.Module, state: Mapping[str, Tensor], convert: Convert, source: str) -> Mapping[str, Tensor]:
    """The state dict with timm's names; as it was where it has these names and timm's conversion fails."""
    # Some conversions take no model, some change the dictionary that they are given, and some print.
    arguments = (dict(state), model)[: len(inspect.signature(convert).parameters)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return convert(*arguments)
    except _UNFIT as error:
        if state.keys() & model.state_dict().keys():
            return state
        _refuse_transformers(model, state, source)
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: timm cannot convert its names "
            f"({', '.join(list(state)[:3])}, ...): {' '.join(str(error).split())[:300]}. Likely cause: another variant "
            "of the architecture, or another architecture; give the model name and arguments these weights were saved "
            "with"
        ) from error


def _refuse_transformers(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    if any(map(_TRANSFORMERS.search, state)):
        raise WeightsError(
            f"{source} has the names of Hugging Face's transformers ({', '.join(list(state)[:3])}, ...), which timm "
            f"does not convert for this {type(model).__name__}. Give the file that the authors publish, or timm's: "
            "model.safetensors of https://huggingface.co/timm/NAME, with the NAME of the backbone"
        )


def _refuse_changes(
    model: Any, original: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, patch_size_given: bool
) -> None:
    """Refuse conversions that lose weights, or change them by more than their names and the grid of positions."""
    sizes = [list(value.shape[2:]) for key, value in original.items() if _PATCHES.search(key) and value.ndim == 4]
    for size in sizes:
        _refuse_patch_size(model, size, source, patch_size_given)
    for key, value in original.items():
        # DINOv3: timm leaves these biases out where the published ones are zero. Those of the keys count for nothing.
        found = _QKV_BIAS.search(key)
        if found is None or any(name.endswith((found[0], found[0].replace("qkv.bias", "q_bias"))) for name in state):
            continue
        query, _, values = value.chunk(3)
        if query.any() or values.any():
            raise WeightsError(
                f"{source}: {key} is not zero, and this {type(model).__name__} has no such bias. Likely cause: weights "
                "of the variant of the architecture that has; give its name, such as vit_base_patch16_dinov3_qkvb"
            )


def _refuse_patch_size(model: Any, size: Iterable[int], source: str, given: bool) -> None:
    own = list(getattr(getattr(model, "patch_embed", None), "patch_size", size))
    if list(size) != own and not given:
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: it has patches of {'x'.join(map(str, size))} pixels, the "
            f"model of {'x'.join(map(str, own))}. Likely cause: the same architecture with another patch size; give "
            "the name of the model with these patches, or resample the weights on purpose by kwargs {'patch_size': N}"
        )


def _load_npz(
    model: Any, path: Path, classifier: Collection[str], unused: Collection[str], patch_size_given: bool
) -> tuple[str, ...]:
    if not hasattr(model, "load_pretrained"):
        raise WeightsError(
            f"{path}: timm reads .npz files for ViT, their hybrids, MLP-Mixer, BiT and NaFlexViT, and not for "
            f"{type(model).__name__}; give weights that end in .safetensors or .pth"
        )
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            blocks = {found[1] for name in arrays.files if (found := _NPZ_BLOCK.search(name))}
            for name in arrays.files:
                if name.endswith("embedding/kernel") and not name.startswith("params/txt") and arrays[name].ndim == 4:
                    _refuse_patch_size(model, arrays[name].shape[:2], str(path), patch_size_given)
        # What timm does not find it leaves as it is: NaN stays where the file has nothing.
        for value in model.parameters():
            value.data.fill_(torch.nan)
        model.load_pretrained(str(path))
    except WeightsError:
        raise
    except (*_UNFIT, EOFError) as error:
        raise WeightsError(
            f"{path}: timm cannot read it as weights of {type(model).__name__}: {str(error)[:300]}. Likely cause: a "
            "damaged file, or weights of another architecture or size than the backbone named"
        ) from error
    loaded = model.state_dict()
    absent = [key for key, value in loaded.items() if value.is_floating_point() and value.isnan().any()]
    stages = getattr(model, "stages", [model])
    depth = sum(len(stage.blocks) for stage in stages if hasattr(stage, "blocks"))
    needed = [key for key in absent if not under(key, {*classifier, *unused})]
    if needed or len(blocks) > depth:
        lacking = f"it lacks {', '.join(needed[:8])}" if needed else f"it has {len(blocks)} blocks, the model {depth}"
        raise WeightsError(
            f"{path} does not fit {type(model).__name__}: {lacking}. Likely cause: another variant of the "
            "architecture; give the model name that these weights were saved with"
        )
    model.load_state_dict(loaded | {key: initial[key] for key in absent})
    return (*classifier, *absent)

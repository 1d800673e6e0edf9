"""Coarse features of images, from any timm model with intermediate maps."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from featup._timm import timm
from featup.aliases import resolve_backbone
from featup.conversion import create_for_weights, load_backbone_weights
from featup.errors import GeometryError, WeightsError
from featup.maps import as_size, check_fit, choose_map, finer_layers, list_layers, nearest_fit, times
from featup.models import classifier_names, create_model, download_model, unused_names
from featup.weights import state_digest

__all__ = ["Backbone", "Norm", "create_backbone"]

Norm = Literal["none", "model", "layer"]

# Arguments of timm.create_model that other arguments of create_backbone decide.
_DECIDED = {
    "img_size": "image_size",
    "dynamic_img_size": "image_size",
    "pretrained": "pretrained",
    "checkpoint_path": "weights",
    "features_only": "layer or stride",
    "in_chans": "the images, which have 3 channels",
}


class Backbone(nn.Module):
    """A frozen timm model that maps images to one of its intermediate maps; see ``create_backbone``.

    It stays in evaluation mode, also inside a module that is set to train, and its parameters take no gradients.
    Gradients do flow through ``features`` to the images.

    Attributes:
        name: timm's name of the model.
        layer: index of the map, from 0.
        stride: pixels per feature, (height, width).
        channels: C of the map.
        norm: the normalisation of the map: ``none``, ``model`` or ``layer``.
        final_norm: whether timm applies the model's own final norm to the map (where the model has one).
        mean, std: per channel, for images in [0, 1].
        input_size: (height, width) given to ``create_backbone``, by default that of the model's training.
        fixed_size: the only (height, width) that is served; None if every multiple of the stride is served.
        digest: SHA-256 over all weights but the classifier's, and those that a file lacks because the map does not
            depend on them; before any resampling to ``input_size``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        layer: int,
        stride: tuple[int, int],
        channels: int,
        norm: Norm,
        final_norm: bool,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int],
        fixed: bool,
        digest: str,
    ) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.name = name
        self.layer = layer
        self.stride = stride
        self.channels = channels
        self.norm = norm
        self.final_norm = final_norm
        self.mean = _rgb("mean", mean)
        self.std = _rgb("std", std)
        self.input_size = input_size
        self.fixed_size = input_size if fixed else None
        self.digest = digest
        self._mean: Tensor
        self._std: Tensor
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: dropout and batch statistics would tie one image to its batch mates."""
        return super().train(False)

    def extra_repr(self) -> str:
        """Name, layer, stride and channels, in one line."""
        return f"{self.name}, layer={self.layer}, stride={times(self.stride)}, channels={self.channels}"

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) of the map for images of ``size`` (height, width) in pixels.

        Raises GeometryError, with the nearest sizes that fit, for another size.
        """
        if self.fixed_size and tuple(size) != self.fixed_size:
            raise GeometryError(
                f"{self.name} was created for images of {times(self.fixed_size)} (height x width) and cannot "
                f"take {times(size)}; create it with image_size={tuple(size)}, or resize the images"
            )
        check_fit(self.name, self.layer, self.stride, size)
        return size[0] // self.stride[0], size[1] // self.stride[1]

    def normalise(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] -> normalised images for ``features``, float32 [B, 3, H, W]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise GeometryError(
                f"images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}; "
                "normalise images of other kinds with .mean and .std, and call .features"
            )
        return (images.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std

    def features(self, normalised: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> their map, float32 [B, h, w, C], contiguous.

        ``h, w`` is ``grid((H, W))``. Differentiable with respect to the images. Raises GeometryError for images that
        do not fit the stride, and for a model whose map has another size than its stride says.
        """
        if normalised.ndim != 4 or normalised.shape[1] != 3:
            raise GeometryError(f"normalised images must be [B, 3, H, W], got {list(normalised.shape)}")
        intermediate = self._intermediate(normalised)
        if mismatch := self._mismatch(normalised, intermediate):
            even = nearest_fit((normalised.shape[2], normalised.shape[3]), (2 * self.stride[0], 2 * self.stride[1]))
            raise GeometryError(
                f"{mismatch}. Likely cause: blocks that need another multiple of the stride; give images of an even "
                f"one, such as {times(even)}, or choose a layer of a finer stride"
            )
        features: Tensor = intermediate.permute(0, 2, 3, 1).float()
        if self.norm == "layer":
            features = layer_norm(features, (self.channels,))
        return features.contiguous()

    def _intermediate(self, normalised: Tensor) -> Tensor:
        """The map as timm gives it, [B, C, h, w]."""
        self.grid((normalised.shape[2], normalised.shape[3]))
        intermediate: Tensor
        (intermediate,) = self.model.forward_intermediates(
            normalised,
            indices=[self.layer],
            norm=self.final_norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return intermediate

    def _mismatch(self, normalised: Tensor, intermediate: Tensor) -> str:
        """How a map differs from timm's description of it; empty where it does not."""
        height, width = normalised.shape[2:]
        expected = (normalised.shape[0], self.channels, *self.grid((height, width)))
        if tuple(intermediate.shape) == expected:
            return ""
        return (
            f"{self.name}, layer {self.layer}, gives a map of {list(intermediate.shape)} [B, C, h, w] for images of "
            f"{height}x{width}, where timm says {list(expected)}, by stride {times(self.stride)}"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] -> their map, float32 [B, h, w, C], contiguous; see ``features``."""
        return self.features(self.normalise(images))


def create_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    layer: int = -1,
    stride: int | None = None,
    norm: Norm = "model",
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> Backbone:
    """Create a frozen backbone from timm's model ``name``, on the CPU.

    Args:
        name: timm's name of the architecture, with or without its tag of the weights, or one of
            ``featup.aliases.BACKBONE_ALIASES`` such as ``dinov2_vits14`` or ``ViT-B/16``.
        weights: a local file with timm's names, or the authors' published checkpoint where timm converts it; see
            :func:`featup.conversion.load_backbone_weights`. All that the map depends on must be there, and fit.
        pretrained: whether timm downloads the weights instead. Without either the weights are random, by ``seed``.
        layer: index of the map: the block of a ViT, the stage of a CNN; negative counts from the last.
        stride: instead of ``layer``: the deepest map with this many pixels per feature.
        norm: ``none`` leaves the map as it is. ``model`` applies the model's own final norm to the last map, if timm
            can apply it to maps; other maps are left as they are. ``layer`` does the same and then normalises every
            feature over its channels to mean 0 and variance 1, without parameters; FeatUp's upsamplers were trained
            on such features.
        image_size: (height, width) of the images in pixels. Most models take every size that fits the stride, and
            resample their position embeddings. The others (``fixed_size``) take this size only, by default that of
            their training.
        mean, std: of the normalisation, per channel for images in [0, 1]; by default timm's for the model. Weights
            trained elsewhere often need others.
        seed: of the random weights; the global generators are left alone.
        kwargs: more arguments of ``timm.create_model``, such as ``{"pad_type": "same"}``.

    Raises GeometryError for a model, layer, stride, size or argument that cannot be served, and WeightsError for
    weights that cannot be downloaded or do not fit. A missing file raises FileNotFoundError.
    """
    name = resolve_backbone(name)
    arguments = dict(kwargs or {})
    if conflicting := [f"{key} (decided by {_DECIDED[key]})" for key in arguments if key in _DECIDED]:
        raise GeometryError(f"kwargs hold {', '.join(conflicting)}; leave that out and use the argument named")
    if weights is not None and pretrained:
        raise WeightsError(f"weights={weights} and pretrained=True exclude each other; give one of them")
    if norm not in get_args(Norm):
        raise GeometryError(f"norm={norm!r} is not one of {', '.join(get_args(Norm))}")

    with torch.random.fork_rng(devices=[]):
        # On the meta device a model costs neither memory nor weights, and its geometry can be checked first.
        with torch.device("meta"):
            sketch = create_model(name, arguments)
        maps = [(int(stage["reduction"]), int(stage["num_chs"])) for stage in sketch.feature_info]
        index = choose_map(name, maps, layer, stride)
        step = _stride(sketch, maps[index][0])
        data = timm.data.resolve_model_data_config(sketch)
        native = as_size(data["input_size"][1:])
        size = native if image_size is None else as_size(image_size)
        parameters = {key for cls in type(sketch).__mro__ for key in inspect.signature(cls).parameters}
        fixed = bool(sketch.pretrained_cfg.get("fixed_input_size")) and "dynamic_img_size" not in parameters
        if fixed or image_size is not None:
            check_fit(name, index, step, size, finer_layers(maps, size))
        resize = fixed and size != native
        if "dynamic_img_size" in parameters:
            arguments["dynamic_img_size"] = True
        elif resize and not hasattr(sketch, "set_input_size"):
            if "img_size" not in parameters:
                raise GeometryError(
                    f"{name} takes images of {times(native)} (height x width) only, not of {times(size)}; "
                    "resize the images to that, or choose another model"
                )
            arguments["img_size"] = size
            resize = False

        # Only the CPU's generator is restored afterwards, so only this generator is seeded.
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            if weights is not None:
                model, convert = create_for_weights(lambda: create_model(name, arguments, pretrained=True))
            else:
                model = download_model(name, arguments) if pretrained else create_model(name, arguments)

    final_norm = norm != "none" and index == len(maps) - 1
    not_of_file = classifier_names(model)
    if weights is not None:
        not_of_file = load_backbone_weights(
            model,
            weights,
            convert=convert,
            classifier=not_of_file,
            unused=unused_names(sketch, index, final_norm),
            patch_size_given="patch_size" in arguments,
        )
    digest = state_digest(model.state_dict(), ignore=not_of_file)
    if resize:
        # After loading, so that trained position embeddings are resampled instead of refused.
        try:
            model.set_input_size(img_size=size)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise GeometryError(_refusal(name, size, native, error)) from error

    backbone = Backbone(
        model,
        name=name,
        layer=index,
        stride=step,
        channels=maps[index][1],
        norm=norm,
        final_norm=final_norm,
        mean=data["mean"] if mean is None else mean,
        std=data["std"] if std is None else std,
        input_size=size,
        fixed=fixed,
        digest=digest,
    )
    # A free size is not square, so that swapped axes show, and small, so that it costs little.
    coarsest = max(reduction for reduction, _ in maps)
    _verify(backbone, maps, native, size if fixed else (3 * coarsest, 6 * coarsest))
    return backbone


def _stride(model: Any, reduction: int) -> tuple[int, int]:
    # timm gives one number for both axes: the longer side, if a patch is not square.
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and max(patch) == reduction:
        return patch[0], patch[1]
    return reduction, reduction


def _verify(
    backbone: Backbone, maps: Sequence[tuple[int, int]], native: tuple[int, int], size: tuple[int, int]
) -> None:
    """Compute a map for images of ``size``, to refuse a model whose map differs from timm's description of it."""
    images = torch.zeros(1, 3, *size)
    try:
        with torch.inference_mode():
            if mismatch := backbone._mismatch(images, backbone._intermediate(images)):
                raise GeometryError(f"{mismatch}. Likely cause: {_fitting(backbone, maps, images)}")
    except GeometryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        if not (backbone.final_norm and isinstance(error, AssertionError)):
            raise GeometryError(_refusal(backbone.name, size, native, error)) from error
        # Models that cannot apply their norm to maps assert that it is not asked for.
        backbone.final_norm = False
        _verify(backbone, maps, native, size)


def _fitting(backbone: Backbone, maps: Sequence[tuple[int, int]], images: Tensor) -> str:
    """Why the chosen map is not as timm describes it, and what to give: options whose maps are."""
    intermediates = backbone.model.forward_intermediates(images, norm=False, output_fmt="NCHW", intermediates_only=True)
    fitting = []
    for index, (intermediate, (reduction, channels)) in enumerate(zip(intermediates, maps, strict=True)):
        step = _stride(backbone.model, reduction)
        grid = (images.shape[2] // step[0], images.shape[3] // step[1])
        if tuple(intermediate.shape[1:]) == (channels, *grid):
            fitting.append(index)
    if backbone.final_norm and backbone.layer in fitting:
        return "its own final norm, which changes the map's channels; give norm='none'"
    cause = "convolutions without padding or blocks that resize, so that features lie on no regular grid over the image"
    if fitting:
        return f"{cause}; give layer={fitting[-1]}, or another that fits: {list_layers(maps, fitting)}"
    return f"{cause}; none of its layers fits, choose another model"


def _refusal(name: str, size: Sequence[int], native: Sequence[int], error: Exception) -> str:
    return (
        f"{name} fails on images of {times(size)} (height x width): {error}. Likely cause: windows, pooling or "
        f"position embeddings that need another size; give another image_size, such as {times(native)}, that of its "
        "training"
    )


def _rgb(what: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3 or (what == "std" and min(values) <= 0):
        raise GeometryError(f"{what} must be 3 numbers, and std above 0; got {tuple(values)}")
    return float(values[0]), float(values[1]), float(values[2])

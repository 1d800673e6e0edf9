"""The methods that an evaluation compares: ways to bring a backbone's features, or a projection of them, to a size."""

from hashlib import sha256
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from featup.backbones import Backbone
from featup.checkpoints import check_backbone
from featup.evaluation.large_image import large_image_features, strided_features
from featup.multiview.average import MultiView
from featup.multiview.field import FeatureField, PerImageUpsampler
from featup.multiview.implicit import Implicit
from featup.published import checkpoint_file
from featup.upsamplers import (
    ChannelMap,
    DeepImagePrior,
    Interpolate,
    Upsampler,
    create_upsampler,
)
from featup.weights import file_digest
from pipeline.config.evaluate import EvaluateConfig, multiview_row
from pipeline.inputs import storage

__all__ = [
    "DeepImagePriorMethod",
    "FeedForwardMethod",
    "LargeImageMethod",
    "Method",
    "PerImageMethod",
    "StridedMethod",
    "UpsamplerMethod",
    "create_methods",
]


class Method(Protocol):
    """A way to upsample.

    Attributes:
        name: In the table.
        digests: Of the weights it was created from.
        per_image: Whether it is fitted to every image, which takes seconds.
    """

    name: str
    digests: dict[str, str]
    per_image: bool

    def predict(self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]) -> Tensor:
        """Upsampled features, with a projection of their channels.

        Args:
            images: uint8 ``[B, H, W, 3]``.
            features: The backbone's of these images, float32 ``[B, h, w, C]``.
            projection: To ``K`` channels; ``None`` keeps all channels as they are.
            size: (height, width) of the result.

        Returns:
            ``[B, H', W', K]``, or ``[B, H', W', C]`` without a projection.
        """
        ...


@runtime_checkable
class FeedForwardMethod(Method, Protocol):
    """A method whose :meth:`predict` is differentiable in its projection, and that may filter class scores.

    Attributes:
        filters_scores: Whether it is one linear operator over space for all channels, given the image.
    """

    filters_scores: bool

    def filter_scores(self, images: Tensor, features: Tensor, probe: ChannelMap, size: tuple[int, int]) -> Tensor:
        """A probe's class probabilities at low resolution, upsampled in place of the features.

        The softmax comes before the operator. Logits would be the same as features to a linear operator.

        Args:
            images, features, size: See :meth:`Method.predict`.
            probe: From features to ``K`` logits.

        Returns:
            ``[B, H', W', K]``.
        """
        ...


class UpsamplerMethod:
    """An upsampler under the protocol."""

    per_image = False

    def __init__(self, name: str, upsampler: Upsampler, digests: dict[str, str] | None = None) -> None:
        self.name = name
        self.digests = digests or {}
        self.upsampler = upsampler
        self.filters_scores = upsampler.has_operator

    def filter_scores(self, images: Tensor, features: Tensor, probe: ChannelMap, size: tuple[int, int]) -> Tensor:
        """See :meth:`FeedForwardMethod.filter_scores`."""
        return self.upsampler.apply_operator(features, _probabilities(features, probe), images, size)

    def predict(self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]) -> Tensor:
        """See :meth:`Method.predict`."""
        upsampled: Tensor = self.upsampler(features, images, size, projection)
        return upsampled


class DeepImagePriorMethod(UpsamplerMethod):
    """See :class:`featup.upsamplers.DeepImagePrior`."""

    name = DeepImagePrior.name
    per_image = True

    def __init__(self, steps: int) -> None:
        """
        Args:
            steps: Of each fit.
        """
        super().__init__(self.name, DeepImagePrior(steps))


class PerImageMethod:
    """An upsampler that makes a feature field of each image, kept for later calls with the same image."""

    def __init__(self, name: str, upsampler: PerImageUpsampler, digests: dict[str, str], per_image: bool) -> None:
        """
        Args:
            name: In the table.
            upsampler: Makes the feature fields.
            digests: Of the weights it was created from.
            per_image: Whether each image is fitted.
        """
        self.name = name
        self.digests = digests
        self.per_image = per_image
        self.upsampler = upsampler
        self._fields: dict[bytes, FeatureField] = {}

    def predict(self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]) -> Tensor:
        """See :meth:`Method.predict`."""
        outputs = []
        for image, feature in zip(images, features, strict=True):
            key = sha256(image.cpu().numpy().tobytes()).digest()
            if key not in self._fields:
                (self._fields[key],) = self.upsampler.fields(feature[None], image[None])
            outputs.append(self._fields[key].query(size, projection))
        return torch.stack(outputs)


def _probabilities(features: Tensor, probe: ChannelMap) -> Tensor:
    probe = probe.to(features)
    return functional.linear(features, probe.weight, probe.bias).softmax(-1)


class _FinerFeaturesMethod:
    """Finer features of the backbone itself, interpolated bilinearly to the size; the coarse features are not used."""

    name: str
    per_image = False
    filters_scores = True

    def __init__(self, backbone: Backbone, factor: int) -> None:
        """
        Args:
            backbone: The one to evaluate.
            factor: How many times finer the features are.
        """
        self.digests: dict[str, str] = {}
        self.backbone = backbone
        self.factor = factor
        self._interpolate = Interpolate("bilinear")

    def finer(self, images: Tensor) -> Tensor:
        """The finer features."""
        raise NotImplementedError

    def predict(self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]) -> Tensor:
        """See :meth:`Method.predict`."""
        interpolated: Tensor = self._interpolate(self.finer(images), images, size, projection)
        return interpolated

    def filter_scores(self, images: Tensor, features: Tensor, probe: ChannelMap, size: tuple[int, int]) -> Tensor:
        """See :meth:`FeedForwardMethod.filter_scores`; the probabilities are those of the finer features."""
        probabilities: Tensor = self._interpolate(_probabilities(self.finer(images), probe), images, size)
        return probabilities


class StridedMethod(_FinerFeaturesMethod):
    """See :func:`featup.evaluation.large_image.strided_features`."""

    name = "strided"

    def finer(self, images: Tensor) -> Tensor:
        """See :func:`featup.evaluation.large_image.strided_features`."""
        return strided_features(self.backbone, images, self.factor)


class LargeImageMethod(_FinerFeaturesMethod):
    """See :func:`featup.evaluation.large_image.large_image_features`."""

    name = "large_image"

    def finer(self, images: Tensor) -> Tensor:
        """See :func:`featup.evaluation.large_image.large_image_features`."""
        return large_image_features(self.backbone, images, self.factor)


def create_methods(config: EvaluateConfig, backbone: Backbone, device: torch.device) -> list[Method]:
    """The methods of ``config.rows``, the rows of the table, ready to predict.

    Raises:
        FeatupError: a checkpoint that cannot be read, or of another backbone.
    """
    finer = {method.name: method for method in (StridedMethod, LargeImageMethod)}
    methods: list[Method] = []
    for row in config.rows:
        name, _, file = row.partition("=")
        if (multiview := multiview_row(row)) is not None:
            base = _upsampler_method(config, backbone, device, multiview.base, multiview.file)
            options = config.multiview_options(multiview.views, held_out=0)
            averaging = MultiView(backbone, base.upsampler, options)
            title = row.replace(multiview.file, str(Path(multiview.file).with_suffix(""))) if multiview.file else row
            methods.append(PerImageMethod(title, averaging, base.digests, per_image=False))
        elif name in finer:
            methods.append(finer[name](backbone, config.factor))
        elif name == DeepImagePriorMethod.name:
            methods.append(DeepImagePriorMethod(config.prior_steps))
        elif name == Implicit.name:
            implicit = Implicit(backbone, None, config.implicit_options("paper" if file else None))
            methods.append(PerImageMethod(row, implicit, {}, per_image=True))
        else:
            methods.append(_upsampler_method(config, backbone, device, name, file))
    return methods


def _upsampler_method(
    config: EvaluateConfig, backbone: Backbone, device: torch.device, name: str, file: str
) -> UpsamplerMethod:
    checkpoint = checkpoint_file(name, storage.local_copy(file) if file else None)
    upsampler = create_upsampler(
        name,  # type: ignore[arg-type]  # the config has checked it
        channels=backbone.channels,
        checkpoint=checkpoint,
        bilateral=config.bilateral,
    ).to(device)
    if checkpoint is None:
        return UpsamplerMethod(name, upsampler)
    check_backbone(checkpoint, backbone)
    checkpoints = [row for row in config.rows if row.partition("=")[0] == name]
    title = name if len(checkpoints) <= 1 or not file else f"{name} {Path(file).with_suffix('')}"
    return UpsamplerMethod(title, upsampler, {"checkpoint": file_digest(checkpoint)})

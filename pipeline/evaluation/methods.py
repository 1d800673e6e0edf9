"""The rows of an evaluation: ways to bring a backbone's features, or what a linear map makes of them, to a size."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.checkpoints import check_backbone
from featup.evaluation.large_image import large_image_features, strided_features
from featup.multiview.implicit import Fit, FitOptions, Implicit
from featup.projection import PCAFit
from featup.upsamplers import (
    ChannelMap,
    DeepImagePrior,
    Interpolate,
    Upsampler,
    create_upsampler,
)
from featup.weights import file_digest
from pipeline.config.evaluate import EvaluateConfig
from pipeline.inputs import storage

__all__ = ["DeepImagePriorRow", "ImplicitRow", "LargeImageRow", "Row", "StridedRow", "UpsamplerRow", "make_rows"]


class Row(Protocol):
    """One way.

    Attributes:
        name: In the table.
        digests: Of the files it was made from.
        per_image: Whether it is fitted to every image it is given, which takes seconds.
    """

    name: str
    digests: dict[str, str]
    per_image: bool

    def predict(self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]) -> Tensor:
        """Upsampled features, with a map of channels applied to them.

        Args:
            images: uint8 ``[B, H, W, 3]``.
            features: The backbone's of these images, float32 ``[B, h, w, C]``.
            projection: To ``K`` channels; ``None`` for all channels as they are.
            size: (height, width) of the result.

        Returns:
            ``[B, H', W', K]``, or ``[B, H', W', C]`` without a projection.
        """
        ...


class UpsamplerRow:
    """An upsampler under the protocol."""

    per_image = False

    def __init__(self, name: str, upsampler: Upsampler, digests: dict[str, str] | None = None) -> None:
        self.name = name
        self.digests = digests or {}
        self.upsampler = upsampler

    def predict(self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]) -> Tensor:
        """See :meth:`Row.predict`."""
        upsampled: Tensor = self.upsampler(features, images, size, projection)
        return upsampled


class DeepImagePriorRow(UpsamplerRow):
    """See :class:`featup.upsamplers.DeepImagePrior`."""

    name = DeepImagePrior.name
    per_image = True

    def __init__(self, steps: int) -> None:
        """
        Args:
            steps: Of each fit.
        """
        super().__init__(self.name, DeepImagePrior(steps))


class ImplicitRow:
    """Fits to every image, each kept for whatever is asked of the image later."""

    name = "implicit"
    per_image = True

    def __init__(self, backbone: Backbone, base: Upsampler, config: EvaluateConfig, digests: dict[str, str]) -> None:
        """
        Args:
            backbone: The one to evaluate.
            base: What fits start from and add to.
            config: Says how images are fitted.
            digests: Of the files the base was made from.
        """
        self.digests = digests
        self.backbone = backbone
        self.base = base
        self.config = config
        self.options = FitOptions(steps=config.fit_steps, views=config.fit_views)
        self._implicit: Implicit | None = None
        self._fits: dict[bytes, Fit] = {}

    def learn(self, features: Tensor) -> None:
        """Take the space of the fits from coarse features of a data set ``[N, h, w, C]``; fits made before are left."""
        fit = PCAFit(features.shape[-1])
        fit.add(features)
        pca = fit.solve(min(self.config.fit_components, features.shape[-1]))
        self._implicit = Implicit(self.backbone, pca, self.base, self.options)
        self._fits = {}

    def predict(self, images: Tensor, features: Tensor, projection: ChannelMap | None, size: tuple[int, int]) -> Tensor:
        """See :meth:`Row.predict`."""
        if self._implicit is None:
            self.learn(features)
        assert self._implicit is not None
        outputs = []
        for image, feature in zip(images, features, strict=True):
            key = sha256(image.cpu().numpy().tobytes()).digest()
            if key not in self._fits:
                (self._fits[key],) = self._implicit.fit(feature[None], image[None])
            outputs.append(self._fits[key].query(size, projection=projection or _identity(features)))
        return torch.stack(outputs)


def _identity(features: Tensor) -> ChannelMap:
    channels = features.shape[-1]
    return ChannelMap(torch.eye(channels).to(features), features.new_zeros(channels))


class _OwnFeaturesRow:
    """Finer features from the backbone, interpolated bilinearly from there on; the coarse ones are not used."""

    name: str
    per_image = False

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
        """See :meth:`Row.predict`."""
        interpolated: Tensor = self._interpolate(self.finer(images), images, size, projection)
        return interpolated


class StridedRow(_OwnFeaturesRow):
    """See :func:`featup.inference.strided_features`."""

    name = "strided"

    def finer(self, images: Tensor) -> Tensor:
        """See :func:`featup.inference.strided_features`."""
        return strided_features(self.backbone, images, self.factor)


class LargeImageRow(_OwnFeaturesRow):
    """See :func:`featup.inference.large_image_features`."""

    name = "large_image"

    def finer(self, images: Tensor) -> Tensor:
        """See :func:`featup.inference.large_image_features`."""
        return large_image_features(self.backbone, images, self.factor)


def make_rows(config: EvaluateConfig, backbone: Backbone, device: torch.device) -> list[Row]:
    """The rows that are asked for, ready.

    Raises:
        FeatupError: a checkpoint that cannot be read, or of another backbone.
    """
    own = {row.name: row for row in (StridedRow, LargeImageRow)}
    bases = ("bilinear", "bilateral", "jbu")
    rows: list[Row] = []
    for name, _, file in (spec.partition("=") for spec in config.rows):
        if name in own:
            rows.append(own[name](backbone, config.factor))
        elif name == DeepImagePriorRow.name:
            rows.append(DeepImagePriorRow(config.prior_steps))
        elif name == "implicit":
            base = file if file in bases else "jbu" if file else "bilateral"
            started_from = _upsampler_row(config, backbone, device, base, file if base == "jbu" else "")
            rows.append(ImplicitRow(backbone, started_from.upsampler, config, started_from.digests))
        else:
            rows.append(_upsampler_row(config, backbone, device, name, file))
    return rows


def _upsampler_row(
    config: EvaluateConfig, backbone: Backbone, device: torch.device, name: str, file: str
) -> UpsamplerRow:
    checkpoint = storage.local_copy(file) if file else None
    upsampler = create_upsampler(
        name,  # type: ignore[arg-type]  # the config has checked it
        channels=backbone.channels,
        checkpoint=checkpoint,
        sigma_space=config.sigma_space,
        sigma_colour=config.sigma_colour,
    ).to(device)
    if checkpoint is None:
        return UpsamplerRow(name, upsampler)
    check_backbone(checkpoint, backbone)
    alone = _trained_names(config.rows).count(name) <= 1
    title = name if alone else f"{name} {Path(file).with_suffix('')}"
    return UpsamplerRow(title, upsampler, {"checkpoint": file_digest(checkpoint)})


def _trained_names(specs: Sequence[str]) -> list[str]:
    return [spec.partition("=")[0] for spec in specs if "=" in spec]

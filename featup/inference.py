"""A backbone and an upsampler as one model, for images in memory."""

import os
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from featup._timm import timm
from featup.aliases import BACKBONE_ALIASES
from featup.backbones import Backbone, Norm, create_backbone
from featup.checkpoints import check_backbone, load_pca
from featup.errors import GeometryError
from featup.images import ImageLike, as_images, resize_images
from featup.maps import as_size, nearest_fit, times
from featup.multiview.average import MultiView, MultiViewOptions
from featup.multiview.field import PerImageUpsampler
from featup.multiview.implicit import Implicit
from featup.names import PerImageName, PublishedName, TrainableName, UpsamplerName
from featup.projection import PCA, PCAFit
from featup.upsamplers import ChannelMap, Upsampler, create_upsampler

__all__ = ["LONGEST_SIDE", "Model", "list_backbones", "list_upsamplers", "load"]

LONGEST_SIDE = 512
"""Pixels of the longer side that larger images are shrunk to, where no size is given.

Features at the size of a photograph would take gigabytes: 384 channels at 3000x4000 are 18 GB, at 384x512 0.3 GB."""

# Where a store keeps its PCA.
_PCA_OF_STORE = Path("plan", "pca.safetensors")

Size: TypeAlias = int | tuple[int, int]


class Model(nn.Module):
    """Dense features of images, at any resolution; see :func:`load`.

    It stays in evaluation mode and takes no gradients; its results can be used to train other modules.

    Attributes:
        backbone: Maps images to coarse features; see :class:`featup.Backbone`.
        upsampler: Maps these and the images to features at any size; see :class:`featup.Upsampler`.
        image_size: (height, width) in pixels of the images given to the backbone, in calls that give none; ``None``
            for a size that follows from the images.
    """

    def __init__(self, backbone: Backbone, upsampler: Upsampler, image_size: Size | None = None) -> None:
        """
        Args:
            backbone, upsampler: On one device.
            image_size: See the attribute; one number for a square.

        Raises:
            GeometryError: a size that the backbone cannot take.
        """
        super().__init__()
        self.backbone = backbone
        self.upsampler = upsampler
        self.image_size = None if image_size is None else as_size(image_size)
        if self.image_size is not None:
            backbone.grid(self.image_size)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Model":
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the model is, and its results are."""
        return next(self.backbone.parameters()).device

    @property
    def channels(self) -> int:
        """Of the features, without a PCA."""
        return self.backbone.channels

    @torch.no_grad()
    def forward(
        self,
        images: "ImageLike | Sequence[ImageLike]",
        size: Size | None = None,
        image_size: Size | None = None,
        pca: PCA | int | str | os.PathLike[str] | None = None,
    ) -> Tensor:
        """Features of images at any resolution.

        Args:
            images: One image or a batch: a path, a PIL image, an array or tensor ``[H, W, 3]`` or ``[3, H, W]`` (uint8,
                or floating point from 0 to 1), a batch of these with a fourth axis in front, or a list; see
                :func:`featup.images.as_images`.
            size: (height, width) of the result in pixels, or one number for a square; at least the coarse map's. By
                default ``image_size`` where it is given, else the images' own size; images with a side of more than
                512 pixels are shrunk to that, with their aspect ratio.
            image_size: (height, width) in pixels that the images are resized to for the backbone, or one number for a
                square; multiples of the backbone's stride. A larger one gives finer coarse features, at more cost. By
                default that of :func:`load`, else the only size that the backbone takes, else the images' own size
                (shrunk as above) with each side rounded to the nearest multiple of the stride.
            pca: Project the features: a :class:`featup.PCA`, its file, or the folder of a store that has one. An
                integer K fits the K principal components to the coarse features of these images, one basis for the
                batch; another call then has another basis.

        Returns:
            float32 ``[H, W, C]`` for one image, ``[B, H, W, C]`` for a batch, on the model's device; with a PCA its
            ``K`` components in place of the ``C`` channels.

        Raises:
            ImageError: an image that cannot be read, or whose layout or range is not clear.
            GeometryError: a size that cannot be served, images of different sizes without a size, a PCA of other
                channels.
            WeightsError: a PCA that cannot be read, or of another backbone.
        """
        singles, batched = as_images(images)
        seen, target = self._sizes(singles, size, image_size)
        coarse = self.backbone(self._resized(singles, seen))
        projection = None if pca is None else self._projection(pca, coarse)
        guidance = target
        if isinstance(self.upsampler, PerImageUpsampler):
            # Its views are of the image that the backbone sees, which a smaller guidance would blur.
            guidance = max(seen[0], target[0]), max(seen[1], target[1])
        features: Tensor = self.upsampler(coarse, self._resized(singles, guidance), target, projection)
        return features if batched else features[0]

    @torch.no_grad()
    def coarse(self, images: "ImageLike | Sequence[ImageLike]", image_size: Size | None = None) -> Tensor:
        """The backbone's own features, before any upsampling.

        Args:
            images, image_size: As for a call of the model.

        Returns:
            float32 ``[h, w, C]`` for one image, ``[B, h, w, C]`` for a batch, where ``(h, w)`` is the size of the image
            given to the backbone divided by its stride.

        Raises:
            ImageError, GeometryError: as a call of the model does.
        """
        singles, batched = as_images(images)
        seen, _ = self._sizes(singles, None, image_size)
        coarse: Tensor = self.backbone(self._resized(singles, seen))
        return coarse if batched else coarse[0]

    def __repr__(self) -> str:
        backbone = self.backbone
        sizes = "any size" if backbone.fixed_size is None else f"{times(backbone.fixed_size)} only"
        return (
            f"Model({backbone.name} on {self.device}\n"
            f"  backbone: layer {backbone.layer}, stride {times(backbone.stride)}, {backbone.channels} channels, "
            f"images of {sizes if self.image_size is None else times(self.image_size)}\n"
            f"  upsampler: {self.upsampler.name}\n)"
        )

    def _sizes(
        self, images: Sequence[Tensor], size: Size | None, image_size: Size | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the images given to the backbone, and of the result."""
        given = self.image_size if image_size is None else as_size(image_size)
        seen = given or self.backbone.fixed_size
        target = given if size is None else as_size(size)
        if seen is None or target is None:
            shapes = {(image.shape[0], image.shape[1]) for image in images}
            if len(shapes) > 1:
                lacking = "image_size=" if size is not None else "image_size= (and size=, if the result is another)"
                raise GeometryError(
                    f"images of different sizes in one batch: {', '.join(sorted(map(times, shapes))[:5])} (height x "
                    f"width); give {lacking} to resize them to one, or call the model for each"
                )
            (own,) = shapes
            scale = min(1, LONGEST_SIDE / max(own))
            target = target or (max(round(own[0] * scale), 1), max(round(own[1] * scale), 1))
            seen = seen or nearest_fit((own[0] * scale, own[1] * scale), self.backbone.stride)
        return seen, target

    def _resized(self, images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        return torch.cat([resize_images(image[None].to(self.device), size) for image in images])

    def _projection(self, pca: PCA | int | str | os.PathLike[str], coarse: Tensor) -> ChannelMap:
        if isinstance(pca, int):
            fit = PCAFit(coarse.shape[-1])
            fit.add(coarse)
            pca = fit.solve(pca)
        elif not isinstance(pca, PCA):
            path = Path(pca)
            if path.is_dir():
                path = path / _PCA_OF_STORE
            pca = load_pca(path)
            check_backbone(path, self.backbone)
        return pca.as_channel_map()


def load(
    name: str,
    upsampler: UpsamplerName | PerImageName | Upsampler | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    jbu: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    view_base: UpsamplerName = "bilateral",
    views: int = 16,
    image_size: Size | None = None,
    layer: int = -1,
    stride: int | None = None,
    norm: Norm = "model",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> Model:
    """A backbone and an upsampler as one model, ready to be called with images::

        model = featup.load("dinov2_vits14")
        features = model("photo.jpg")  # [H, W, 384]

    Args:
        name: Of the backbone: timm's, or another of :func:`list_backbones` such as ``dinov2_vits14`` or ``ViT-B/16``.
        upsampler: A name of :func:`list_upsamplers`, or an :class:`featup.Upsampler`; by default ``bilateral``, which
            follows the image's edges and needs no training. ``multiview`` averages shifted views of each image;
            ``implicit`` fits a network to each image, which takes much longer.
        weights: A local file of the backbone's weights; by default timm downloads its own.
        pretrained: ``False`` leaves the weights random where no file is given: for tests and timings.
        jbu: The checkpoint of a JBU, from ``featup train`` or an official FeatUp ``.ckpt``. The official ones were
            trained on features with ``norm="layer"``, save those named ``no_norm``.
        checkpoint: That of another trained upsampler, which ``upsampler`` names; by default ``anyup`` downloads its
            published one.
        view_base: For ``multiview``: the upsampler of the averaged views, for which ``checkpoint`` then is.
        views: For ``multiview``: how many views of an image are averaged, each a pass of the backbone.
        image_size: (height, width) in pixels, or one number for a square, of the images given to the backbone; see
            :meth:`Model.forward`. Some models are created for one size, by default that of their training.
        layer, stride, norm, mean, std, kwargs: Choose the backbone's map and arguments; see
            :func:`featup.create_backbone`.
        device: By default the GPU where torch sees one, else the CPU.

    Raises:
        GeometryError: a name, layer, size or combination of options that cannot be served.
        WeightsError: weights that cannot be downloaded or do not fit, or a checkpoint of another backbone.
        FileNotFoundError: a file that is not there.
    """
    file = jbu if checkpoint is None else checkpoint
    method = ("bilateral" if jbu is None else "jbu") if upsampler is None else upsampler
    if (jbu is not None and method != "jbu") or (jbu is not None and checkpoint is not None):
        raise GeometryError(
            f"jbu={jbu} with upsampler={_name(method)!r} and checkpoint={checkpoint}: jbu= names the upsampler and its "
            "checkpoint; leave the others out, or give upsampler= and checkpoint= without it"
        )
    takers = (*get_args(TrainableName), *get_args(PublishedName))
    feed_forward = view_base if method == MultiView.name else method
    if file is not None and feed_forward not in takers:
        raise GeometryError(
            f"checkpoint={file} with upsampler={_name(method)!r}, which takes none; give upsampler= one of "
            f"{', '.join(takers)}, or leave the checkpoint out"
        )
    if not isinstance(method, Upsampler) and method not in list_upsamplers():
        raise GeometryError(f"unknown upsampler {method!r}; there are {', '.join(list_upsamplers())}")
    backbone = create_backbone(
        name,
        weights=None if weights is None else Path(weights),
        pretrained=pretrained and weights is None,
        layer=layer,
        stride=stride,
        norm=norm,
        image_size=None if image_size is None else as_size(image_size),
        mean=mean,
        std=std,
        kwargs=kwargs,
    )
    if not isinstance(method, Upsampler):
        method = _create(method, backbone, None if file is None else Path(file), view_base, views)
    if file is not None:
        check_backbone(Path(file), backbone)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(backbone, method, image_size).to(device)


def list_backbones(pattern: str | None = None, *, pretrained: bool = False) -> list[str]:
    """Names of backbones that :func:`load` and ``--backbone`` take: aliases first, then timm's.

    These are the architectures that timm has intermediate maps of. Some give maps off the image's grid; they are
    refused when they are created, with the layers that can be served.

    Args:
        pattern: Only names that match, in any case: with ``*`` and ``?`` as in file names, else those that contain it.
        pretrained: timm's names with the tag of each of their published weights, and only models that have such.
    """
    names = list(BACKBONE_ALIASES)
    for module in timm.list_modules():
        if _has_maps(f"timm.models.{module}"):
            names += timm.list_models(module=module, pretrained=pretrained)
    if pattern is None:
        return names
    pattern = pattern.lower() if set("*?[") & set(pattern) else f"*{pattern.lower()}*"
    return [name for name in names if fnmatch(name.lower(), pattern)]


def list_upsamplers() -> list[str]:
    """Names of upsamplers that :func:`load` takes; the trained ones, from ``jbu`` to ``ifa``, need a checkpoint."""
    return [*get_args(UpsamplerName), *get_args(PerImageName)]


def _create(
    name: UpsamplerName | PerImageName,
    backbone: Backbone,
    checkpoint: Path | None,
    view_base: UpsamplerName,
    views: int,
) -> Upsampler:
    if name == "implicit":
        return Implicit(backbone)
    base = view_base if name == "multiview" else name
    upsampler = create_upsampler(base, channels=backbone.channels, checkpoint=checkpoint)
    return MultiView(backbone, upsampler, MultiViewOptions(views=views)) if name == "multiview" else upsampler


def _has_maps(module: str) -> bool:
    """Whether the models that a module of timm defines have intermediate maps; all have in timm 1.0.31.

    By the classes it defines or imports, because creating more than a thousand models takes minutes.
    """
    if module not in sys.modules:  # Of models that the user registered; creating them tells.
        return True
    values = vars(sys.modules[module]).values()
    return any(isinstance(value, type) and hasattr(value, "forward_intermediates") for value in values)


def _name(upsampler: str | Upsampler) -> str:
    return upsampler if isinstance(upsampler, str) else upsampler.name

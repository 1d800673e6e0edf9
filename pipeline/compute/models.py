"""Backbone, upsampler and projection of one config on one device, and the PCA of a data set."""

import hashlib
import platform
from dataclasses import asdict, dataclass, replace

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from featup.backbones import Backbone, create_backbone
from featup.checkpoints import check_backbone
from featup.errors import GeometryError
from featup.images import resize_images
from featup.multiview.average import MultiView
from featup.multiview.field import FeatureField, PerImageUpsampler
from featup.multiview.implicit import Implicit
from featup.projection import PCA, PCAFit
from featup.published import checkpoint_file
from featup.upsamplers import ChannelMap, Upsampler, create_upsampler
from featup.weights import file_digest
from pipeline.compute.device import choose_device
from pipeline.compute.load import decode_options, load_sample
from pipeline.config.base import BackboneConfig
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import ConfigError, SampleError, StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.store.layout import finished_attributes, list_differences
from pipeline.store.provenance import feature_space, pca_place, stored_config, stored_pca, weights_place

__all__ = ["Extractor", "Setup", "fit_pca", "keep_weights", "make_backbone", "pca_place", "take_pca", "weights_place"]


@dataclass(frozen=True)
class Setup:
    """What is known of the models before the first unit, and must be the same in every actor.

    ``grid`` is the (height, width) of the coarse features; ``digests`` name the weights, the checkpoint and the PCA.
    """

    channels: int
    grid: tuple[int, int]
    stride: tuple[int, int]
    layer: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digests: dict[str, str]
    device: str

    def with_pca(self, pca: PCA, data: bytes) -> "Setup":
        """The same with a PCA, ``data`` as a file, whose components are the channels."""
        digests = self.digests | {"pca": hashlib.sha256(data).hexdigest()}
        return replace(self, channels=len(pca.components), digests=digests)


def make_backbone(config: BackboneConfig, weights: str | None = None) -> Backbone:
    """The backbone that the options name, on the CPU.

    Args:
        config: names it.
        weights: file or URL of its weights; by default ``config.weights``, else timm's own where it is pretrained.

    Raises:
        FeatupError: a model, layer, size or weights that do not fit.
    """
    weights = weights or config.weights
    return create_backbone(
        config.backbone,
        weights=storage.local_copy(weights) if weights else None,
        pretrained=config.pretrained and weights is None,
        layer=config.layer,
        stride=config.stride,
        norm=config.norm,
        image_size=config.size,
        kwargs=config.backbone_kwargs,
        mean=config.mean,
        std=config.std,
    )


def keep_weights(config: BackboneConfig) -> str | None:
    """Download timm's weights once, into the store: no actor, and no later run, asks the hub for them again.

    Returns:
        The file's name; ``None`` where nothing is downloaded.

    Raises:
        WeightsError: timm cannot get them.
    """
    place = weights_place(config)
    # A file without a store may be of a run with other options that ended early: nothing holds it to a digest yet.
    if place is not None and not (storage.exists(place) and finished_attributes(config.out)):
        # Without an image size: weights as they are published, before any resampling.
        backbone = create_backbone(config.backbone, pretrained=True, kwargs=config.backbone_kwargs)
        state = {name: value.contiguous().clone() for name, value in backbone.model.state_dict().items()}
        storage.write_atomic(place, safetensors.torch.save(state))
    return place


class Extractor:
    """Backbone, upsampler and projection of one config on one device."""

    def __init__(
        self,
        config: PrecomputeConfig,
        pca: PCA | None = None,
        weights: str | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        """
        Args:
            config: names backbone and upsampler; ``gpus_per_actor`` chooses the device.
            pca: gives principal components in place of the channels.
            weights: file or URL of the backbone's weights, see :func:`make_backbone`.
            backbone: that of the config, where it is made already.

        Raises:
            ConfigError: a GPU is asked for, and there is none.
            FeatupError: a model, layer, size or checkpoint that does not fit.
        """
        self.config = config
        self.device = choose_device(config.gpus_per_actor)
        self.backbone: Backbone = (backbone or make_backbone(config, weights)).to(self.device)
        self.grid = self.backbone.grid(config.size)
        self.digests = {"backbone": self.backbone.digest}
        self.upsampler = self._create_upsampler().to(self.device)
        largest, target = self.upsampler.largest(self.grid), config.target_size
        if largest and (target.height > largest[0] or target.width > largest[1]):
            raise GeometryError(
                f"{config.upsampler} brings {self.grid[0]}x{self.grid[1]} to at most {largest[0]}x{largest[1]} and "
                f"output_size is {target}; ask for less, or train a deeper stack"
            )
        self.projection: ChannelMap | None = None
        self.channels = self.backbone.channels
        if pca is not None:
            self.project(pca)

    def project(self, pca: PCA) -> None:
        """From now on give principal components in place of the channels."""
        self.projection = pca.as_channel_map()
        self.channels = len(pca.components)
        if isinstance(self.upsampler, Implicit):
            self.upsampler.pca = pca

    def _create_upsampler(self) -> Upsampler:
        config, name = self.config, self.config.feed_forward
        if name is None:
            return Implicit(self.backbone, None, config.implicit_options())
        checkpoint = checkpoint_file(name, storage.local_copy(config.checkpoint) if config.checkpoint else None)
        upsampler = create_upsampler(
            name,
            channels=self.backbone.channels,
            checkpoint=checkpoint,
            bilateral=config.bilateral,
        )
        if checkpoint:
            check_backbone(checkpoint, self.backbone)
            self.digests["checkpoint"] = file_digest(checkpoint)
        if config.upsampler == "multiview":
            options = config.multiview_options(config.views, config.held_out_views)
            return MultiView(self.backbone, upsampler, options)
        return upsampler

    def setup(self) -> Setup:
        """The facts every actor must agree on."""
        return Setup(
            channels=self.channels,
            grid=self.grid,
            stride=self.backbone.stride,
            layer=self.backbone.layer,
            mean=self.backbone.mean,
            std=self.backbone.std,
            digests=self.digests,
            device=torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"cpu ({platform.processor() or platform.machine()})",
        )

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Images uint8 ``[B, H, W, 3]`` to coarse features float32 ``[B, h, w, C]``."""
        images = resize_images(images.to(self.device), self.config.size)
        dtype = getattr(torch, self.config.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            features: Tensor = self.backbone(images)
        return features.float()

    @torch.inference_mode()
    def upsample(self, features: Tensor, images: Tensor, out: Tensor) -> list[FeatureField]:
        """Coarse features and their images into ``out`` float16 ``[B, H', W', K]``, projected.

        Returns:
            The images' feature fields where the upsampler makes such, else nothing.
        """
        images, size = images.to(self.device), self.config.target_size
        if not isinstance(self.upsampler, PerImageUpsampler):
            self.upsampler(features, images, size, self.projection, out)
            return []
        fields = self.upsampler.fields(features, images)
        for image_out, field in zip(out, fields, strict=True):
            field.query(size, self.projection, image_out)
        return fields


def fit_pca(extractor: Extractor, plan: Plan, components: int, images: int) -> PCA:
    """Fit a PCA on the coarse features of ``images`` samples spread evenly over the data set.

    Upsampled features are means of coarse ones, so these are the ones to fit on. The samples follow from the plan
    alone, so the fit is the same in every run.

    Raises:
        ConfigError: not one of the samples can be decoded.
        GeometryError: more components than channels or vectors.
    """
    options = decode_options(extractor.config, extractor.backbone.mean)
    options = replace(options, labels=())
    fit = PCAFit(extractor.backbone.channels)
    count = min(images, plan.samples)
    problems: list[str] = []
    batch: list[NDArray[np.uint8]] = []
    for number in range(count):
        shard, position = plan.sample(int((number + 0.5) * plan.samples / count))
        try:
            batch.append(load_sample(plan.index(shard), position, options).image)
        except SampleError as error:
            problems.append(str(error))
        if batch and (len(batch) == extractor.config.batch_size or number == count - 1):
            fit.add(extractor.features(torch.from_numpy(np.stack(batch))))
            batch = []
    if not fit.count:
        raise ConfigError(
            f"not one of the {count} samples the PCA is fitted on can be decoded: {problems[0]}; look at the shards"
        )
    return fit.solve(components)


def take_pca(store: str, config: PrecomputeConfig, setup: Setup) -> tuple[PCA, bytes]:
    """Another store's PCA and its file's bytes, for a run with ``config`` and ``setup``.

    Raises:
        ConfigError: its backbone gives other features than this run's.
        StoreError: there is no such store, it is not complete, it has all channels, or its PCA file was replaced.
    """
    other = stored_config(store)
    if "pca" not in other[1]["digests"]:
        raise StoreError(f"{store} holds all channels and no PCA; leave pca_from out, or give a store made with --pca")
    differences = list_differences(feature_space(*other), feature_space(config, asdict(setup)))
    if differences:
        raise ConfigError(
            f"the PCA of {store} is of other features: {'; '.join(differences)}. Give the options of the backbone that "
            "store was made with, or --pca to fit a PCA to this data set"
        )
    return stored_pca(store)

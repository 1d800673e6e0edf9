"""Options of ``jobs.evaluate``."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.base import BackboneConfig, option

__all__ = ["EvaluateConfig"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BackboneConfig):
    """Options of ``jobs.evaluate``: shards of labelled images in, a table of upsamplers out."""

    train: tuple[str, ...] = option((), "segmentation: tar shards with seg.png to fit probes on")
    val: tuple[str, ...] = option((), "segmentation: tar shards with seg.png to evaluate on")
    classes: int | None = option(None, "segmentation: how many classes there are")
    ignore_index: int = option(255, "segmentation: the class id of pixels without a label")
    depth_train: tuple[str, ...] = option((), "depth: tar shards with depth.png or depth.npy to fit probes on")
    depth_val: tuple[str, ...] = option((), "depth: tar shards with depth.png or depth.npy to evaluate on")
    depth_png_scale: float = option(0.001, "metres per unit of depth.png")
    depth_npy_scale: float = option(1.0, "metres per unit of depth.npy")
    cam_shards: tuple[str, ...] = option((), "class activation maps: tar shards with images, labels are not read")
    limit: int | None = option(None, "evaluate on the first so many images of each set")
    train_limit: int | None = option(None, "fit on the first so many images of each set")

    rows: tuple[str, ...] = option(
        ("nearest", "bilinear", "bicubic", "strided", "large_image", "bilateral"),
        "of the table: nearest, bilinear, bicubic, bilateral, strided, large_image; NAME=FILE for those that are "
        "trained: jbu, resize_conv, carafe, sapa, ifa; and those that are fitted to each image: deep_image_prior, "
        "implicit, which starts from bilateral, or implicit=FILE from a jbu",
    )
    fit_steps: int = option(20, "implicit: steps of a fit")
    fit_views: int = option(32, "implicit: jittered views of an image that its fit is made from")
    fit_components: int = option(128, "implicit: principal components of the training images' features to fit in")
    prior_steps: int = option(300, "deep_image_prior: steps of a fit")
    views: int = option(
        0, "also measure the share of variance that each row explains of so many shifted views of an image, 0 for none"
    )
    views_images: int = option(16, "images the views are made of, spread over the set")
    factor: int = option(2, "strided and large_image: how many times finer their features are")
    sigma_space: float = option(1.0, "bilateral: in pixels of a stage")
    sigma_colour: float = option(0.2, "bilateral: on RGB in [-1, 1]")
    retrained: bool = option(True, "also fit probes on each row's own upsampled features")
    pixels: int = option(100, "retrained: pixels of every training image that the probe is fitted on")
    seeds: int = option(1, "retrained: how many probes, each on other pixels")
    max_vectors: int = option(200_000, "fit a probe on no more feature vectors than this, drawn by a seed")
    resamples: int = option(200, "of the images, for the intervals of differences")
    pictures: int = option(6, "images of each set to make pictures of")
    batch_size: int = option(8, "images upsampled at once", run=True)

    def _checks(self) -> Sequence[tuple[bool, str]]:
        counts = (
            *("limit", "train_limit", "classes", "factor", "pixels", "seeds", "max_vectors", "resamples"),
            *("fit_steps", "fit_views", "fit_components", "prior_steps", "views_images"),
        )
        return [
            *super()._checks(),
            (min(self.size) < 1, f"size={self.size}: both sides must be at least 1"),
            (
                bool(self.train) != bool(self.val) or bool(self.depth_train) != bool(self.depth_val),
                f"train={self.train} with val={self.val}, depth_train={self.depth_train} with "
                f"depth_val={self.depth_val}: a probe is fitted on one and evaluated on the other, give both",
            ),
            (
                not (self.train or self.depth_train or self.cam_shards),
                "nothing to evaluate on; give train and val, depth_train and depth_val, or cam_shards",
            ),
            (
                bool(self.train) != (self.classes is not None),
                f"train={self.train} with classes={self.classes}: segmentation needs both",
            ),
            (not self.rows, "rows is empty; name at least one upsampler"),
            (len(set(self.rows)) != len(self.rows), f"rows={self.rows}: one is named twice"),
            *(
                (
                    getattr(self, name) is not None and getattr(self, name) < 1,
                    f"{name}={getattr(self, name)} must be at least 1",
                )
                for name in (*counts, "batch_size")
            ),
            (
                min(self.pictures, self.views) < 0,
                f"pictures={self.pictures} and views={self.views} must be 0 or more",
            ),
        ]

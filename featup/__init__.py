"""FeatUp (ICLR 2024, arXiv 2403.10516): high-resolution features from any vision backbone, for images in memory.

A backbone maps images to coarse features, and an upsampler maps these and the images to features at any size::

    model = featup.load("dinov2_vits14", upsampler="bilateral")
    features = model("photo.jpg")  # [H, W, 384]; a batch gives [B, H, W, 384]

and the two parts by themselves::

    backbone = featup.create_backbone("vit_small_patch16_224", pretrained=True)
    upsampler = featup.create_upsampler("bilateral", channels=backbone.channels)
    features = upsampler(backbone(images), images, size=(224, 224))  # uint8 [B, H, W, 3] to [B, 224, 224, C]

Every public name is imported at its first use, so that ``import featup`` loads neither torch nor timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featup.backbones import Backbone, create_backbone
    from featup.checkpoints import load_pca, load_probe, load_upsampler
    from featup.errors import BackendError, FeatupError, GeometryError, ImageError, WeightsError
    from featup.inference import Model, list_backbones, list_upsamplers, load
    from featup.projection import PCA, PCAFit
    from featup.upsamplers import ChannelMap, Upsampler, create_upsampler

    __version__: str

__all__ = [
    "PCA",
    "Backbone",
    "BackendError",
    "ChannelMap",
    "FeatupError",
    "GeometryError",
    "ImageError",
    "Model",
    "PCAFit",
    "Upsampler",
    "WeightsError",
    "__version__",
    "create_backbone",
    "create_upsampler",
    "list_backbones",
    "list_upsamplers",
    "load",
    "load_pca",
    "load_probe",
    "load_upsampler",
]

_MODULES = {
    "featup.backbones": ("Backbone", "create_backbone"),
    "featup.checkpoints": ("load_pca", "load_probe", "load_upsampler"),
    "featup.errors": ("BackendError", "FeatupError", "GeometryError", "ImageError", "WeightsError"),
    "featup.inference": ("Model", "list_backbones", "list_upsamplers", "load"),
    "featup.projection": ("PCA", "PCAFit"),
    "featup.upsamplers": ("ChannelMap", "Upsampler", "create_upsampler"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("featup-datasets")
    elif name in _MODULE_OF:
        try:
            value = getattr(import_module(_MODULE_OF[name]), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"featup.{name} needs {error.name}, which is not installed. Likely cause: the base install, which only "
                "reads stores; pip install 'featup-datasets[make]'",
                name=error.name,
            ) from error
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Dataset scale: WebDataset shards in, a Zarr store of high-resolution features out.

The public names are imported at their first use, so that reading a store needs none of what making one does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cluster.precompute import precompute
    from pipeline.cluster.verify import verify
    from pipeline.config.evaluate import EvaluateConfig
    from pipeline.config.precompute import PrecomputeConfig
    from pipeline.config.probe import ProbeConfig
    from pipeline.config.train import TrainConfig
    from pipeline.errors import PipelineError
    from pipeline.loader import FeatureDataset
    from pipeline.options import Size

__all__ = [
    "EvaluateConfig",
    "FeatureDataset",
    "PipelineError",
    "PrecomputeConfig",
    "ProbeConfig",
    "Size",
    "TrainConfig",
    "precompute",
    "verify",
]

_MODULES = {
    "EvaluateConfig": "config.evaluate",
    "FeatureDataset": "loader",
    "PipelineError": "errors",
    "PrecomputeConfig": "config.precompute",
    "ProbeConfig": "config.probe",
    "Size": "options",
    "TrainConfig": "config.train",
    "precompute": "cluster.precompute",
    "verify": "cluster.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    value = getattr(import_module(f"pipeline.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

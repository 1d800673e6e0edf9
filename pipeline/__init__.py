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
    from pipeline.config.predict import PredictConfig
    from pipeline.config.probe import ProbeConfig
    from pipeline.config.train import TrainConfig
    from pipeline.errors import PipelineError
    from pipeline.evaluation.predict import predict
    from pipeline.evaluation.predictor import Predictor, load_predictor
    from pipeline.loader import FeatureDataset
    from pipeline.options import Size

__all__ = [
    "EvaluateConfig",
    "FeatureDataset",
    "PipelineError",
    "PrecomputeConfig",
    "PredictConfig",
    "Predictor",
    "ProbeConfig",
    "Size",
    "TrainConfig",
    "load_predictor",
    "precompute",
    "predict",
    "verify",
]

_MODULES = {
    "EvaluateConfig": "config.evaluate",
    "FeatureDataset": "loader",
    "PipelineError": "errors",
    "PrecomputeConfig": "config.precompute",
    "PredictConfig": "config.predict",
    "Predictor": "evaluation.predictor",
    "ProbeConfig": "config.probe",
    "Size": "options",
    "TrainConfig": "config.train",
    "load_predictor": "evaluation.predictor",
    "precompute": "cluster.precompute",
    "predict": "evaluation.predict",
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

"""PyTorch datasets over a store. Needs neither Ray nor timm."""

from pipeline.loader.dataset import FeatureDataset
from pipeline.store.shard_reader import Window

__all__ = ["FeatureDataset", "Window"]

"""PyTorch datasets over a store. Needs neither Ray nor timm."""

from pipeline.loader.dataset import Codecs, FeatureDataset, Window

__all__ = ["Codecs", "FeatureDataset", "Window"]

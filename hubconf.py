"""Entry points of ``torch.hub.load(CHECKOUT, "load", "dinov2_vits14", source="local")``; the API is that of featup."""

from featup import list_backbones, list_upsamplers, load

__all__ = ["dependencies", "list_backbones", "list_upsamplers", "load"]

dependencies = ["torch", "timm", "safetensors", "numba", "PIL"]

"""Class activation maps of a backbone with its own classifier, on features of any resolution.

Grad-CAM (Selvaraju et al., ICCV 2017): a class's weights are the gradients of its score with respect to the coarse
map, averaged over space, and the activation map is ``ReLU(sum_k w_k F_k)``. The weights come from the coarse features
and are applied to the upsampled features, as in FeatUp (arXiv 2403.10516, section 4.3).

The class token of a ViT reads the patches before its last block only, so the gradient of the score with respect to the
last map is zero. For such a model the classifier is applied to the mean patch in place of the pooled token. For models
that pool by the mean this is the model's own score.
"""

from typing import Any

import torch
from torch import Tensor

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.upsamplers.base import ChannelMap

__all__ = ["class_probabilities", "explain", "grad_cam"]


@torch.no_grad()
def class_probabilities(backbone: Backbone, images: Tensor) -> Tensor:
    """The model's own softmax over its classes, ``[B, classes]``, for images uint8 ``[B, H, W, 3]``.

    Raises:
        GeometryError: a model without a classifier.
    """
    logits = backbone.model(backbone.normalise(images))
    if logits.ndim != 2 or logits.shape[1] != getattr(backbone.model, "num_classes", 0):
        raise GeometryError(
            f"{backbone.name} has no classifier: it gives {list(logits.shape)} for {len(images)} images; class "
            "activation maps need weights with one"
        )
    return logits.float().softmax(-1)  # type: ignore[no-any-return]


def grad_cam(backbone: Backbone, images: Tensor, classes: Tensor) -> list[ChannelMap]:
    """For each image, the channel map from its features to the activation of a class.

    For features that are normalised over their channels (``norm="layer"``), the gradient is with respect to the
    normalised features, at a fixed mean and scale of each.

    Args:
        images: uint8 ``[B, H, W, 3]``.
        classes: Class ids, one for each image, int64 ``[B]``.

    Returns:
        ``B`` maps to one channel, weights ``[1, C]`` and no bias.

    Raises:
        GeometryError: a map through which timm shows no path to the class score.
    """
    model: Any = backbone.model
    with torch.enable_grad():
        normalised = backbone.normalise(images).requires_grad_()
        final, (features,) = model.forward_intermediates(
            normalised, indices=[backbone.layer], norm=backbone.final_norm, output_fmt="NCHW"
        )
        (gradient,) = torch.autograd.grad(
            _score(model.forward_head(final), classes), features, allow_unused=True, retain_graph=True
        )
        if gradient is None:
            if not (backbone.final_norm and backbone.layer == len(model.feature_info) - 1):
                raise GeometryError(
                    f"{backbone.name}, layer {backbone.layer}: timm gives a copy of this map, which the class score "
                    "does not depend on; for class activation maps choose the last layer with norm 'model' or "
                    "'layer', or a CNN"
                )
            mean = features.mean((2, 3))
            # The shape of the head's input, with the mean patch at every position and for every prefix token.
            axis = 1 if final.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NCHW" else final.ndim - 1
            shape = [len(mean), *(mean.shape[1] if dim == axis else 1 for dim in range(1, final.ndim))]
            logits = model.forward_head(mean.view(shape).expand(final.shape))
            (gradient,) = torch.autograd.grad(_score(logits, classes), features)
    if backbone.norm == "layer":
        gradient = gradient * features.detach().std(1, correction=0, keepdim=True)
    weights = gradient.mean((2, 3)).float()
    return [ChannelMap(weight[None], weight.new_zeros(1)) for weight in weights]


def explain(images: Tensor, activations: Tensor) -> Tensor:
    """Explanation maps of Grad-CAM++: images times their activation maps, clipped at zero and scaled to [0, 1].

    Args:
        images: uint8 ``[B, H, W, 3]``.
        activations: ``[B, H, W]``.

    Returns:
        uint8 ``[B, H, W, 3]``; black for a constant map.
    """
    positive = activations.clamp_min(0)
    low, high = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    scaled = (positive - low) / (high - low).clamp_min(torch.finfo(positive.dtype).tiny)
    return (images * scaled[..., None]).round().to(torch.uint8)


def _score(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).sum()

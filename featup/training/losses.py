"""The terms of the training losses, and the explained variance that measures the result.

Every function of a prediction returns a tensor without dimensions. Maps are channels-last.
"""

import torch
from torch import Tensor

from featup.errors import GeometryError

__all__ = [
    "blur_pin",
    "explained_variance",
    "magnitude",
    "reconstruction",
    "sample_positions",
    "sampled_crf",
    "scale_and_shift_invariant",
    "total_variation",
]


# The pairwise kernel of sampled_crf; positions as fractions of the map's sides, colours as the guidance has them.
_APPEARANCE_WEIGHT = 10.0
_APPEARANCE_POSITION_VARIANCE = 0.1
_APPEARANCE_COLOUR_VARIANCE = 0.15
_SMOOTHNESS_WEIGHT = 3.0
_SMOOTHNESS_POSITION_VARIANCE = 0.005
_GRADIENT_WEIGHT = 0.5
_GRADIENT_SCALES = 4


def reconstruction(prediction: Tensor, target: Tensor, log_uncertainty: Tensor | None = None) -> Tensor:
    """Multi-view reconstruction (FeatUp, equations 2 and 3).

    Without an uncertainty it is the mean squared error. With an uncertainty ``s`` it is the mean over all positions of
    ``e / (2 s^2) + log s``, where ``e`` is the squared error, averaged over the channels. This is the negative
    log-likelihood of an error of standard deviation ``s``, up to a constant, and is least for ``s^2 = e``. The paper
    sums ``e`` over the channels; the mean balances the two terms alike for every backbone.

    Args:
        prediction: ``[B, h, w, C]``, the high-resolution features after warp and downsampling.
        target: ``[B, h, w, C]``, the backbone's features of the views.
        log_uncertainty: ``[B, h, w, 1]``, ``log s``, in any range: a network may predict it without an activation.

    Raises:
        GeometryError: shapes that do not belong together.
    """
    _check_alike("reconstruction", prediction, target)
    error = (prediction - target).square()
    if log_uncertainty is None:
        return error.mean()
    if tuple(log_uncertainty.shape) != (*prediction.shape[:-1], 1):
        raise GeometryError(
            f"reconstruction: features {tuple(prediction.shape)} need an uncertainty of "
            f"{(*prediction.shape[:-1], 1)}, got {tuple(log_uncertainty.shape)}; give a log sigma per position"
        )
    likelihood = error.mean(-1, keepdim=True) * torch.exp(-2 * log_uncertainty) / 2 + log_uncertainty
    return likelihood.mean()


def sample_positions(size: tuple[int, int], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample positions for :func:`sampled_crf`, uniformly over a map and with replacement.

    Args:
        size: (height, width) of the map.
        count: Number of positions; the cost of the loss is quadratic in it.
        generator: The only source of chance; the positions are on its device.

    Returns:
        Rows and columns, int64 ``[count]`` each.
    """
    rows, cols = (torch.randint(side, (count,), generator=generator, device=generator.device) for side in size)
    return rows, cols


def sampled_crf(features: Tensor, guidance: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Pairwise energy of a fully connected CRF: features should agree where position and colour do.

    The mean over all images and all ordered pairs ``(p, q)`` of sampled positions of
    ``k(p, q) * |features[p] - features[q]|^2``, with
    ``k = 10 exp(-d^2 / (2 * 0.1) - c^2 / (2 * 0.15)) + 3 exp(-d^2 / (2 * 0.005))``, ``d`` the distance of the
    positions as fractions of the map's height and width, ``c`` that of the guidance (Kraehenbuehl and Koltun,
    NIPS 2011; the constants are those of FeatUp's implicit upsampler).

    Args:
        features: ``[B, H, W, C]``.
        guidance: ``[B, H, W, 3]``, the image, normalised with the mean and standard deviation of ImageNet: the
            constants are for colours on that scale.
        rows, cols: int64 ``[N]``, the same for all images; see :func:`sample_positions`.

    Raises:
        GeometryError: maps of different sizes, or no positions.
    """
    if features.dim() != 4 or features.shape[:3] != guidance.shape[:3] or rows.shape != cols.shape or not len(rows):
        raise GeometryError(
            f"sampled_crf: need features [B, H, W, C], guidance [B, H, W, 3] and N > 0 rows and columns, got "
            f"{tuple(features.shape)}, {tuple(guidance.shape)}, {tuple(rows.shape)} and {tuple(cols.shape)}; bring "
            "the guidance to the features' size"
        )
    places = torch.stack([rows / features.shape[1], cols / features.shape[2]], -1).to(guidance)
    colours = guidance[:, rows, cols]
    distance = _squared_distances(places)
    kernel = _APPEARANCE_WEIGHT * torch.exp(
        -distance / (2 * _APPEARANCE_POSITION_VARIANCE)
        - _squared_distances(colours) / (2 * _APPEARANCE_COLOUR_VARIANCE)
    ) + _SMOOTHNESS_WEIGHT * torch.exp(-distance / (2 * _SMOOTHNESS_POSITION_VARIANCE))
    kernel, vectors = kernel.to(features), features[:, rows, cols]
    # sum_pq k |f_p - f_q|^2 = 2 sum_p f_p . (sum_q k f_p - sum_q k f_q): no [N, N, C]. Differences do not depend on the
    # mean, and without it they lose fewer digits.
    vectors = vectors - vectors.mean(1, keepdim=True)
    difference = kernel.sum(-1, keepdim=True) * vectors - kernel @ vectors
    energy: Tensor = 2 * (vectors * difference).sum() / kernel.numel()
    return energy


def total_variation(features: Tensor) -> Tensor:
    """Squared differences of neighbours down and across, summed, over the number of entries of the map.

    Args:
        features: ``[B, H, W, C]``.
    """
    return (features.diff(dim=1).square().sum() + features.diff(dim=2).square().sum()) / features.numel()


def magnitude(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of the vectors' norms: upsampled features should have the norms of the backbone's.

    Args:
        prediction: ``[B, h, w, C]``, the high-resolution features after downsampling.
        target: ``[B, h, w, C]``, the backbone's.

    Raises:
        GeometryError: different shapes.
    """
    _check_alike("magnitude", prediction, target)
    difference: Tensor = torch.linalg.vector_norm(prediction, dim=-1) - torch.linalg.vector_norm(target, dim=-1)
    return difference.square().mean()


def blur_pin(features: Tensor, coarse: Tensor) -> Tensor:
    """Mean squared difference between the unweighted mean of each patch and its coarse feature: a regulariser.

    A learned downsampler may weight only a part of its patch. This term pins the rest of the patch.

    Args:
        features: ``[B, H, W, C]``, at high resolution.
        coarse: ``[B, h, w, C]``, with ``h`` a divisor of ``H`` and ``w`` of ``W``.

    Raises:
        GeometryError: maps whose sizes are not multiples, or of another batch or number of channels.
    """
    batch, height, width, channels = features.shape
    _, h, w, _ = coarse.shape
    if coarse.shape[::3] != (batch, channels) or height % h or width % w:
        raise GeometryError(
            f"blur_pin: features {tuple(features.shape)} do not split into the patches of {tuple(coarse.shape)}; "
            "height and width must be whole multiples, batch and channels the same"
        )
    patches = features.reshape(batch, h, height // h, w, width // w, channels)
    return (patches.mean((2, 4)) - coarse).square().mean()


def scale_and_shift_invariant(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Depth up to its scale and shift (Ranftl et al., MiDaS, TPAMI 2022).

    Per image, the prediction is first aligned with the target by the scale and shift of least squares over the mask,
    and gradients flow through both. The loss is half the mean squared error plus 0.5 times a gradient term, summed
    over the steps 1, 2, 4 and 8: on every step-th pixel, from the first, the absolute differences of the error between
    neighbours in the mask, over the pixels in the mask. Means are over all pixels in the mask of the batch, so an image
    without any does not count, and the loss of an empty mask is 0. A prediction that is constant over the mask gets
    scale 0.

    Args:
        prediction: Depth ``[B, H, W]``, or inverse depth if the target is.
        target: ``[B, H, W]``.
        mask: ``[B, H, W]``, true or not zero where the target is known. Elsewhere both are ignored and may be NaN.

    Raises:
        GeometryError: different shapes.
    """
    _check_alike("scale_and_shift_invariant", prediction, target)
    _check_alike("scale_and_shift_invariant", prediction, mask)
    known = mask != 0
    # Not by a product: NaN times zero is NaN.
    prediction = torch.where(known, prediction, 0)
    target = torch.where(known, target, 0)
    valid = known.to(prediction)
    count = valid.sum((1, 2), keepdim=True).clamp_min(1)
    mean = prediction.sum((1, 2), keepdim=True) / count
    target_mean = target.sum((1, 2), keepdim=True) / count
    centred = (prediction - mean) * valid
    spread = centred.square().sum((1, 2), keepdim=True) / count
    shared = (centred * (target - target_mean)).sum((1, 2), keepdim=True) / count
    # A constant less its mean leaves rounding errors, and the scale would be noise.
    flat = spread <= (16 * torch.finfo(spread.dtype).eps * mean).square()
    scale = torch.where(flat, 0, shared / torch.where(flat, 1, spread))
    error = (scale * centred + target_mean - target) * valid
    loss = error.square().sum() / (2 * valid.sum().clamp_min(1))
    for level in range(_GRADIENT_SCALES):
        step = 2**level
        part, there = error[:, ::step, ::step], valid[:, ::step, ::step]
        down = (part.diff(dim=1).abs() * there[:, 1:] * there[:, :-1]).sum()
        across = (part.diff(dim=2).abs() * there[:, :, 1:] * there[:, :, :-1]).sum()
        loss = loss + _GRADIENT_WEIGHT * (down + across) / there.sum().clamp_min(1)
    return loss


def explained_variance(prediction: Tensor, target: Tensor) -> Tensor:
    """R^2 of a prediction, for held-out views: ``1 - sum (prediction - target)^2 / sum (target - mean)^2``.

    The sums run over all entries, and the mean is per channel. 1 is perfect, 0 as good as the mean. For a target
    without variance it is 1 if the prediction is exact, else minus infinity.

    Args:
        prediction, target: ``[..., C]``.

    Raises:
        GeometryError: different shapes.
    """
    _check_alike("explained_variance", prediction, target)
    residual = (prediction - target).square().sum()
    channels_last = target.reshape(-1, target.shape[-1])
    total = (channels_last - channels_last.mean(0)).square().sum()
    return 1 - torch.where(residual == 0, 0, residual / total)


def _squared_distances(points: Tensor) -> Tensor:
    """``[..., N, K]`` to ``[..., N, N]``."""
    return (points[..., :, None, :] - points[..., None, :, :]).square().sum(-1)


def _check_alike(loss: str, prediction: Tensor, other: Tensor) -> None:
    if prediction.shape != other.shape:
        raise GeometryError(
            f"{loss}: the shapes must be the same, got {tuple(prediction.shape)} and {tuple(other.shape)}; "
            "broadcasting would hide a mistake"
        )

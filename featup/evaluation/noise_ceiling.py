"""The ceiling of held-out views' explained variance: what the noise of the backbone itself leaves to explain.

A map explains a view's token by the mean over its patch. Two views whose crops differ by whole strides, or that mirror
one another, have tokens of exactly the same pixels, for which every map predicts the same. The backbone's features of
them differ all the same, by position and context. That difference is noise to every map, however fine.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from featup.multiview.views import Jitter, View

__all__ = ["noise_ceiling", "partner_views"]


def partner_views(
    view: View, jitter: Jitter, stride: tuple[int, int], count: int, generator: torch.Generator
) -> list[View]:
    """Sample other views whose tokens are of the same pixels: crops moved by whole strides, mirrored or not.

    Args:
        view: Not zoomed.
        jitter: The distribution that the view was sampled from; partners stay inside its border.
        stride: (height, width) of a token, in pixels.
        count: The most to sample; there may be fewer, and at least one, the mirrored view.
        generator: The only source of chance.
    """
    down, across = (
        range(at % step, 2 * jitter.max_pad + 1, step) for at, step in zip((view.top, view.left), stride, strict=True)
    )
    partners = [View(view.zoom, top, left, flip) for top, left, flip in product(down, across, (False, True))]
    partners.remove(view)
    order = torch.randperm(len(partners), generator=generator)[:count]
    return [partners[number] for number in order.tolist()]


def noise_ceiling(
    features: Callable[[Sequence[View]], Tensor],
    views: Sequence[View],
    targets: Tensor,
    jitter: Jitter,
    stride: tuple[int, int],
    partners: int,
    generator: torch.Generator,
) -> float:
    """The explained variance of views' features that the best map of the image could reach: ``1 - noise / variance``.

    The noise of a token is estimated from a second, independent set of views, the partners of its view: with ``n``
    features of the same pixels among them, the squared distance to their mean is on average ``1 + 1 / n`` times the
    noise. Tokens that no partner has, at the views' borders, do not count.

    Args:
        features: The backbone's features of some views of the image, ``[V, h, w, C]``.
        views: That are explained, not zoomed; they are not among their own partners.
        targets: Their features ``[V, h, w, C]``.
        jitter: The distribution that the views were sampled from.
        stride: (height, width) of a token, in pixels.
        partners: The most partners of a view.
        generator: Samples the partners.

    Returns:
        At most 1; see :func:`featup.training.losses.explained_variance`, which it is a bound of.
    """
    noise, tokens = 0.0, 0
    for view, target in zip(views, targets.double(), strict=True):
        chosen = partner_views(view, jitter, stride, partners, generator)
        total = torch.zeros_like(target)
        count = target.new_zeros(*target.shape[:2], 1)
        for partner, other in zip(chosen, features(chosen).double(), strict=True):
            ours, theirs = zip(
                *(
                    _overlap((there - here) // step, size)
                    for here, there, step, size in zip(
                        (view.top, view.left), (partner.top, partner.left), stride, target.shape[:2], strict=True
                    )
                ),
                strict=True,
            )
            total[ours] += _in_crop(other, partner)[theirs]
            count[ours] += 1
        known = count[..., 0] > 0
        error = (_in_crop(target, view) - total / count.clamp_min(1)).square() * count / (count + 1)
        noise += float(error[known].sum())
        tokens += int(known.sum())
    flat = targets.double().flatten(0, 2)
    variance = float((flat - flat.mean(0)).square().sum()) / len(flat)
    return 1 - noise / max(1, tokens) / variance if variance else 1.0


def _in_crop(features: Tensor, view: View) -> Tensor:
    """A view's features ``[h, w, C]`` in the order of its crop, before the mirror."""
    return features.flip(1) if view.flip else features


def _overlap(moved: int, size: int) -> tuple[slice, slice]:
    """Along an axis of ``size`` tokens, those that a crop ``moved`` tokens further on has too: here, and there."""
    return slice(max(0, moved), size + min(0, moved)), slice(max(0, -moved), size - max(0, moved))

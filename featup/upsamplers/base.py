"""The protocol every upsampler satisfies, and the algebra that moves channel mixing to low resolution."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor, nn

from featup.errors import GeometryError

__all__ = ["ChannelMap", "Upsampler", "as_guidance", "keeping_lengths", "of_length", "row_bands", "stage_sizes"]


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """An affine map of channels, ``y = x @ weight.T + bias``: a PCA, a 1x1 convolution, a linear probe.

    ``weight`` ``[K, C]``, ``bias`` ``[K]``.
    """

    weight: Tensor
    bias: Tensor

    def after(self, first: "ChannelMap | None") -> "ChannelMap":
        """The map that applies ``first`` and then this one."""
        if first is None:
            return self
        return ChannelMap(self.weight @ first.weight, self.weight @ first.bias + self.bias)

    def to(self, like: Tensor) -> "ChannelMap":
        """The same map on the device and in the floating type of ``like``."""
        return ChannelMap(self.weight.to(like), self.bias.to(like))


class Upsampler(nn.Module):
    """``upsampler(features [B, h, w, C], guidance [B, H, W, 3], size=(H', W')) -> [B, H', W', C]``.

    ``guidance`` is the image, uint8 or floating in [0, 1]. Sub-classes that are linear over space, with the same
    operator for every channel, implement :meth:`bands` (and :meth:`mixing` if they end in a map of channels). Those
    whose operator depends on all the channels, or is not linear, override :meth:`mapped_bands`.
    """

    name: str

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        size: tuple[int, int],
        projection: ChannelMap | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Upsample, then apply ``projection`` if given.

        A channel map commutes with a linear operator over space, so it runs at low resolution, where it costs
        ``h * w / (H' * W')`` as much; its bias is added at the end, because the operator's rows need not sum to one.
        Only the channels that come out are upsampled.

        Args:
            features: ``[B, h, w, C]``.
            guidance: ``[B, H, W, 3]``, uint8 or floating in [0, 1].
            size: (height, width) of the result, at least the features' own.
            projection: Channel map to ``K`` channels, applied to the upsampled features.
            out: Where to put the result, contiguous, in any floating type; not differentiable.

        Returns:
            ``[B, H', W', C]``, or ``[B, H', W', K]`` with a projection.

        Raises:
            GeometryError: shapes that do not fit each other, or a result smaller than the features.
        """
        if features.dim() != 4 or guidance.dim() != 4 or guidance.shape[-1] != 3 or len(features) != len(guidance):
            raise GeometryError(
                f"{self.name}: need features [B, h, w, C] and guidance [B, H, W, 3] of one batch, got "
                f"{tuple(features.shape)} and {tuple(guidance.shape)}; both are channels-last"
            )
        if size[0] < features.shape[1] or size[1] < features.shape[2]:
            raise GeometryError(
                f"{self.name}: cannot upsample {tuple(features.shape[1:3])} (height, width) to the smaller {size}; "
                "ask for at least the features' own size"
            )
        if projection is not None and projection.weight.shape[1] != features.shape[-1]:
            raise GeometryError(
                f"{self.name}: a projection of {projection.weight.shape[1]} channels cannot take features of "
                f"{features.shape[-1]}; fit it on this backbone and layer"
            )
        mixing = self.mixing(features.shape[-1])
        total = mixing if projection is None else projection.to(features).after(mixing)
        shape = (len(features), *size, features.shape[-1] if total is None else len(total.bias))
        if out is not None and tuple(out.shape) != shape:
            raise GeometryError(f"{self.name}: out must be {list(shape)}, got {list(out.shape)}")
        differentiable = torch.is_grad_enabled() and out is None
        if out is None and not differentiable:
            out = features.new_empty(shape)
        images = []
        for index in range(len(features)):
            one = slice(index, index + 1)
            bands = []
            # A copy, at the allocator's own alignment: matrix products round by the address of their input.
            for rows, band in self.mapped_bands(features[one].clone(), guidance[one], size, total):
                if out is None:
                    bands.append(band)
                else:
                    out[one, rows].copy_(band)
            if out is None:
                images.append(torch.cat(bands, 1))
        if out is not None:
            return out
        return torch.cat(images) if images else features.new_empty(shape)

    def mixing(self, channels: int) -> ChannelMap | None:
        """The channel map the upsampler itself ends in, for ``channels`` input channels; ``None`` if it has none."""
        return None

    def largest(self, low: tuple[int, int]) -> tuple[int, int] | None:
        """The largest (height, width) that maps of (height, width) ``low`` can be brought to; ``None`` for any."""
        return None

    def mapped_bands(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of the upsampled and then mapped features at a time, for one image.

        Here the map runs at low resolution and :meth:`bands` on what comes out. Sub-classes that need the features
        themselves, to predict kernels from them for instance, override this and map only what is upsampled.

        Args:
            features, guidance, size: ``[1, h, w, C]``, ``[1, H, W, 3]`` and the result's (height, width).
            total: Channel map to ``K`` channels, :meth:`mixing` included; ``None`` for none.

        Yields:
            The rows, from the top, and what stands in them: ``[1, rows, W', K]``, a tensor nobody else holds.
        """
        if total is None:
            yield from self.bands(features, guidance, size)
            return
        # Image by image like the rest: a product over the whole batch rounds by the batch's size.
        low = torch.nn.functional.linear(features, total.weight)
        for rows, linear in self.bands(low, guidance, size):
            yield rows, linear + total.bias if torch.is_grad_enabled() else linear.add_(total.bias)

    def bands(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """The linear operator over space, for one image, some rows of the result at a time.

        Args:
            features, guidance, size: ``[1, h, w, C]``, ``[1, H, W, 3]`` and the result's (height, width).

        Yields:
            The rows, from the top, and what stands in them: ``[1, rows, W', C]``, a tensor nobody else holds.
        """
        raise NotImplementedError


def keeping_lengths(mean: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Weighted means of vectors, each as long as the vectors in it are on average.

    A mean is shorter than what it is the mean of, the more so the less that agrees. A probe of the vectors would take
    it for weaker evidence, where it is better evidence.

    Args:
        mean: What makes the means, the same for every channel: ``[..., K]`` to ``[..., K]``.
        vectors: ``[..., C]``.

    Returns:
        ``[..., C]``.
    """
    found = mean(torch.cat([vectors, vectors.norm(dim=-1, keepdim=True)], -1))
    return of_length(found[..., :-1], found[..., -1:])


def of_length(vectors: Tensor, lengths: Tensor) -> Tensor:
    """Vectors ``[..., C]`` brought to lengths ``[..., 1]``; one of no length keeps it."""
    brought: Tensor = vectors * (lengths / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-6))
    return brought


def row_bands(size: tuple[int, int], pixels: int | None, device: torch.device) -> Iterator[slice]:
    """Slices of rows of at most ``pixels`` positions each (or one row), together all rows of a map of ``size``.

    By default a band is what stays in a CPU's cache, or enough to keep a GPU busy.
    """
    if pixels is None:
        pixels = 1 << (14 if device.type == "cpu" else 18)
    step = max(1, pixels // size[1])
    for start in range(0, size[0], step):
        yield slice(start, min(start + step, size[0]))


def as_guidance(guidance: Tensor, dtype: torch.dtype) -> Tensor:
    """The image as floating point in [0, 1], from uint8 or floating point."""
    return guidance.to(dtype) / 255 if guidance.dtype == torch.uint8 else guidance.to(dtype)


def stage_sizes(low: tuple[int, int], high: tuple[int, int]) -> Sequence[tuple[int, int]]:
    """Sizes after each 2x stage from ``low`` to ``high``, both (height, width); the last one is exactly ``high``.

    The number of stages is the least that needs no more than a doubling in each. A patch-14 ViT on 224x224 goes
    16, 32, 64, 128, 224.

    Raises:
        GeometryError: ``high`` is smaller than ``low``, or ``low`` is empty.
    """
    if min(low) < 1 or high[0] < low[0] or high[1] < low[1]:
        raise GeometryError(f"stages go up from at least 1x1: cannot reach {high} from {low} (height, width)")
    count = ceil(log2(max(high[0] / low[0], high[1] / low[1])))
    between = [(min(low[0] << i, high[0]), min(low[1] << i, high[1])) for i in range(1, count)]
    return [*between, high] if count else []

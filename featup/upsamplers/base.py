"""The protocol of every upsampler, and the algebra that applies channel maps at low resolution."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor, nn

from featup.errors import GeometryError

__all__ = [
    "ChannelMap",
    "Upsampler",
    "as_guidance",
    "norm_preserving_mean",
    "normalise_colours",
    "rescale_to_norm",
    "row_slices",
    "stage_sizes",
]


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """An affine map of channels, ``y = x @ weight.T + bias``: a PCA, a 1x1 convolution, a linear probe.

    ``weight`` ``[K, C]``, ``bias`` ``[K]``.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def without_bias(cls, weight: Tensor) -> "ChannelMap":
        """``y = x @ weight.T``."""
        return cls(weight, weight.new_zeros(len(weight)))

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

    ``guidance`` is the image, uint8 or floating in [0, 1]. A map is computed in row tiles: some of its rows at a time.
    Sub-classes that are linear over space, with the same operator for every channel, implement :meth:`row_tiles`, and
    :meth:`output_projection` if they end in a channel map. Those whose operator depends on all the channels, or is
    not linear, override :meth:`mapped_row_tiles`; where the operator is the same for every channel all the same, also
    :meth:`operator_row_tiles`.
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

        A channel map commutes with a linear operator over space. It is applied at low resolution, where it costs
        ``h * w / (H' * W')`` as much, and only its output channels are upsampled. Its bias is added at the end, because
        the operator's weights need not sum to one.

        Args:
            features: ``[B, h, w, C]``.
            guidance: ``[B, H, W, 3]``, uint8 or floating in [0, 1].
            size: (height, width) of the result, at least the features' own.
            projection: Channel map to ``K`` channels, applied to the upsampled features.
            out: A contiguous tensor that receives the result, of any floating type; not differentiable.

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
        channel_map = self.output_projection(features.shape[-1])
        if projection is not None:
            channel_map = projection.to(features).after(channel_map)
        shape = (len(features), *size, features.shape[-1] if channel_map is None else len(channel_map.bias))
        if out is not None and tuple(out.shape) != shape:
            raise GeometryError(f"{self.name}: out must be {list(shape)}, got {list(out.shape)}")
        differentiable = torch.is_grad_enabled() and out is None
        if out is None and not differentiable:
            out = features.new_empty(shape)
        images = []
        for index in range(len(features)):
            image = slice(index, index + 1)
            tiles = []
            # A copy, at the allocator's own alignment: matrix products round by the address of their input.
            for rows, tile in self.mapped_row_tiles(features[image].clone(), guidance[image], size, channel_map):
                if out is None:
                    tiles.append(tile)
                else:
                    out[image, rows].copy_(tile)
            if out is None:
                images.append(torch.cat(tiles, 1))
        if out is not None:
            return out
        return torch.cat(images) if images else features.new_empty(shape)

    @property
    def has_operator(self) -> bool:
        """Whether, given image and features, one linear operator over space serves every channel."""
        method = type(self)
        return (
            method.mapped_row_tiles is Upsampler.mapped_row_tiles
            or method.operator_row_tiles is not Upsampler.operator_row_tiles
        )

    def apply_operator(self, features: Tensor, values: Tensor, guidance: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample other values than the features, class probabilities for instance, by the features' operator.

        The channel map that an upsampler may end in is for features, and is left out.

        Args:
            features, guidance, size: As for :meth:`forward`; they determine the operator.
            values: ``[B, h, w, K]``, of the features' grid.

        Returns:
            ``[B, H', W', K]``.

        Raises:
            GeometryError: an upsampler that has no such operator, or values of another grid.
        """
        if not self.has_operator:
            raise GeometryError(
                f"{self.name} is not one linear operator over space for all channels, and upsamples features only; "
                "choose another upsampler, or upsample the features and compute the values from them"
            )
        if values.dim() != 4 or values.shape[:3] != features.shape[:3]:
            raise GeometryError(
                f"{self.name}: values {list(values.shape)} must lie on the grid of the features {list(features.shape)}"
            )
        upsampled = []
        for index in range(len(features)):
            image = slice(index, index + 1)
            tiles = self.operator_row_tiles(features[image].clone(), values[image].clone(), guidance[image], size)
            upsampled.append(torch.cat([tile for _, tile in tiles], 1))
        return torch.cat(upsampled) if upsampled else values.new_empty(0, *size, values.shape[-1])

    def output_projection(self, channels: int) -> ChannelMap | None:
        """The channel map that the upsampler ends in, for ``channels`` input channels; ``None`` if it has none."""
        return None

    def largest(self, low: tuple[int, int]) -> tuple[int, int] | None:
        """The largest (height, width) that a map of (height, width) ``low`` can be upsampled to; ``None`` for any."""
        return None

    def mapped_row_tiles(
        self, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Upsample one image's features and apply a channel map, one row tile at a time.

        This default applies the map to the coarse features and passes the result to :meth:`row_tiles`. A sub-class
        that needs the features themselves, for instance to predict kernels from them, overrides this method and maps
        only the values that it upsamples.

        Args:
            features, guidance, size: ``[1, h, w, C]``, ``[1, H, W, 3]`` and the result's (height, width).
            channel_map: To ``K`` channels, :meth:`output_projection` included; ``None`` for none.

        Yields:
            The tile's rows, from the top, and its values ``[1, rows, W', K]`` in a tensor that the caller may write to.
        """
        if channel_map is None:
            yield from self.row_tiles(features, guidance, size)
            return
        # Image by image like the rest: a product over the whole batch rounds by the batch's size.
        low = torch.nn.functional.linear(features, channel_map.weight)
        for rows, tile in self.row_tiles(low, guidance, size):
            yield rows, tile + channel_map.bias if torch.is_grad_enabled() else tile.add_(channel_map.bias)

    def operator_row_tiles(
        self, features: Tensor, values: Tensor, guidance: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Apply the linear operator over space that image and features determine to other values of one image.

        By default the operator depends on the image alone, and is that of :meth:`row_tiles`.

        Args:
            features, values, guidance, size: ``[1, h, w, C]``, ``[1, h, w, K]``, ``[1, H, W, 3]`` and the result's
                (height, width).

        Yields:
            The tile's rows, from the top, and its values ``[1, rows, W', K]``.
        """
        yield from self.row_tiles(values, guidance, size)

    def row_tiles(self, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """Apply the linear operator over space to one image, one row tile at a time.

        Args:
            features, guidance, size: ``[1, h, w, C]``, ``[1, H, W, 3]`` and the result's (height, width).

        Yields:
            The tile's rows, from the top, and its values ``[1, rows, W', C]`` in a tensor that the caller may write to.
        """
        raise NotImplementedError


def norm_preserving_mean(average: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Weighted means of vectors, each rescaled to the weighted mean of the vectors' norms.

    The norm of a mean falls with the spread of the vectors' directions. A linear probe would read a smaller norm as
    weaker evidence, although an average is better evidence than one vector.

    Args:
        average: The weighted mean, the same for every channel: ``[..., K]`` to ``[..., K]``.
        vectors: ``[..., C]``.

    Returns:
        ``[..., C]``.
    """
    means = average(torch.cat([vectors, vectors.norm(dim=-1, keepdim=True)], -1))
    return rescale_to_norm(means[..., :-1], means[..., -1:])


def rescale_to_norm(vectors: Tensor, norms: Tensor) -> Tensor:
    """Vectors ``[..., C]`` rescaled to norms ``[..., 1]``; a zero vector stays zero."""
    rescaled: Tensor = vectors * (norms / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-6))
    return rescaled


def row_slices(size: tuple[int, int], pixels: int | None, device: torch.device) -> Iterator[slice]:
    """Split the rows of a map of ``size`` into tiles of at most ``pixels`` positions, and of at least one row.

    By default a tile fits a CPU's cache, or keeps a GPU busy.
    """
    if pixels is None:
        pixels = 1 << (14 if device.type == "cpu" else 18)
    step = max(1, pixels // size[1])
    for start in range(0, size[0], step):
        yield slice(start, min(start + step, size[0]))


def as_guidance(guidance: Tensor, dtype: torch.dtype) -> Tensor:
    """The image as floating point in [0, 1], from uint8 or floating point."""
    return guidance.to(dtype) / 255 if guidance.dtype == torch.uint8 else guidance.to(dtype)


def normalise_colours(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colours ``[..., 3]`` in [0, 1] less a mean, over a standard deviation, both on [0, 1]."""
    return (image - image.new_tensor(mean)) / image.new_tensor(std)


def stage_sizes(low: tuple[int, int], high: tuple[int, int]) -> Sequence[tuple[int, int]]:
    """Sizes after each 2x stage from ``low`` to ``high``, both (height, width); the last size is exactly ``high``.

    There are as few stages as possible if none upsamples by more than a factor of 2. A patch-14 ViT on 224x224 goes
    16, 32, 64, 128, 224.

    Raises:
        GeometryError: ``high`` is smaller than ``low``, or ``low`` is empty.
    """
    if min(low) < 1 or high[0] < low[0] or high[1] < low[1]:
        raise GeometryError(f"stages go up from at least 1x1: cannot reach {high} from {low} (height, width)")
    count = ceil(log2(max(high[0] / low[0], high[1] / low[1])))
    between = [(min(low[0] << i, high[0]), min(low[1] << i, high[1])) for i in range(1, count)]
    return [*between, high] if count else []

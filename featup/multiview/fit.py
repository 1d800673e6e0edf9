"""The result of an implicit fit: one image's features, evaluated at any resolution."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featup.errors import GeometryError
from featup.kernels.resample import Taps, interpolation_taps, resample
from featup.multiview.network import ImplicitNetwork, centre_coordinates, scale_colours
from featup.projection import PCA
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, row_slices

__all__ = ["Fit", "initial_map", "residual_taps"]

_TILE_PIXELS = 1 << 14
# Keys' a of the interpolated residual. The patch means of an interpolated map blur it, and a sharp cubic makes up for
# that.
_RESIDUAL_BICUBIC_A = -2.0


@dataclass(frozen=True, eq=False)
class Fit:
    """One image's features as a function of position: initial map + network + blend weight x upsampled residual.

    Attributes:
        explained_variance: Of held-out views' features by the fit; 1 at best.
        initial_explained_variance: The same of the initial map.
        blend_weight: Weight of the upsampled residual, 0 to 1; see :mod:`featup.multiview.back_projection`.
        pca: The space of the network's output.
        base: The feed-forward upsampler of the initial map.
        network: The fitted network, a stack of one.
        features: ``[1, h, w, C]``, which the base upsamples: single-view features or the renormalised multi-view
            average.
        residual: ``[1, h, w, C]``: the multi-view average less the map's patch means; zero without back-projection.
        image: uint8 ``[1, H, W, 3]``.
        scale: ``[1, 1, 1]``: the unit of the network's output in the features' unit.
        log_sigma: From scaled features to their predicted log sigma, one channel (equation 2 of the paper).
    """

    explained_variance: float
    initial_explained_variance: float
    blend_weight: float
    pca: PCA
    base: Upsampler
    network: ImplicitNetwork
    features: Tensor
    residual: Tensor
    image: Tensor
    scale: Tensor
    log_sigma: ChannelMap

    @torch.no_grad()
    def uncertainty(self, features: Tensor) -> Tensor:
        """The predicted error between the fit's and the backbone's features of a view.

        Args:
            features: The backbone's, of the image or a view of it, ``[..., C]``.

        Returns:
            Standard deviation per component of the PCA, in the features' unit, ``[..., 1]``.
        """
        scaled = self.pca.project(features) / self.scale[0]
        log_sigma = self.log_sigma.to(scaled)
        logarithm: Tensor = functional.linear(scaled, log_sigma.weight, log_sigma.bias)
        return logarithm.exp() * self.scale[0]

    @torch.no_grad()
    def query(
        self,
        size: tuple[int, int],
        window: tuple[int, int, int, int] | None = None,
        projection: ChannelMap | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the features at a resolution.

        Args:
            size: (height, width) of the whole map.
            window: (top, left, height, width) of the part to return, in positions of that map; by default all of it.
            projection: From the backbone's channels to ``K``; by default to the space of the PCA.
            out: ``[height, width, K]`` to write into.

        Returns:
            ``[height, width, K]``.

        Raises:
            GeometryError: a window that reaches beyond the map.
        """
        top, left, height, width = window or (0, 0, *size)
        if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
            raise GeometryError(
                f"implicit: window {window} (top, left, height, width) reaches beyond a map of {size} (height, width); "
                "give one within it"
            )
        channel_map = (self.pca.as_channel_map() if projection is None else projection).to(self.features)
        (base,) = initial_map(self.base, self.features, self.image, size, channel_map)
        base = base[top : top + height, left : left + width]
        residual = self.blend_weight * functional.linear(self.residual, channel_map.weight)
        # The network's output has K scaled channels of the PCA. The base alone gives the rest of the channels.
        output_weight = self.scale[0] * (channel_map.weight @ self.pca.components.to(channel_map.weight).T).T
        image = as_guidance(self.image, torch.float32)
        colours = scale_colours(image)
        rows, cols = (interpolation_taps("bilinear", image.shape[axis + 1], size[axis]) for axis in (0, 1))
        residual_rows, residual_cols = residual_taps(residual, size)
        across = centre_coordinates(size[1], image.device)[left : left + width]
        down = centre_coordinates(size[0], image.device)[top : top + height]
        columns = slice(left, left + width)
        if out is None:
            out = torch.empty_like(base)
        for tile in row_slices((height, width), _TILE_PIXELS, image.device):
            within = slice(tile.start + top, tile.stop + top)
            tile_colours = resample(colours, rows[within], cols[columns])
            positions = torch.stack(torch.meshgrid(down[tile], across, indexing="ij"), -1)
            output = self.network(positions.reshape(1, -1, 2), tile_colours.reshape(1, -1, 3))[0] @ output_weight
            features = base[tile] + output.view(-1, width, base.shape[-1])
            if self.blend_weight:
                features += resample(residual, residual_rows[within], residual_cols[columns])[0]
            out[tile].copy_(features)
        return out


@torch.no_grad()
def initial_map(
    base: Upsampler, features: Tensor, guidance: Tensor, size: tuple[int, int], channel_map: ChannelMap
) -> Tensor:
    """The map that a fit starts from: the base's, interpolated bilinearly beyond the base's largest size.

    Args:
        base: The feed-forward upsampler.
        features: ``[B, h, w, C]``.
        guidance: Images ``[B, H, W, 3]``.
        size: (height, width) of the map.
        channel_map: From the backbone's channels to ``K``.

    Returns:
        ``[B, height, width, K]``.
    """
    largest = base.largest((features.shape[1], features.shape[2])) or size
    base_size = (min(size[0], largest[0]), min(size[1], largest[1]))
    upsampled: Tensor = base(features, guidance, base_size, channel_map)
    if base_size == size:
        return upsampled
    rows, cols = (interpolation_taps("bilinear", base_size[axis], size[axis]) for axis in (0, 1))
    return resample(upsampled, rows, cols)


def residual_taps(residual: Tensor, size: tuple[int, int]) -> tuple[Taps, Taps]:
    """Taps along the height and along the width that upsample a residual ``[B, h, w, C]`` to ``size``, bicubic."""
    rows, cols = (
        interpolation_taps("bicubic", residual.shape[axis + 1], size[axis], bicubic_a=_RESIDUAL_BICUBIC_A)
        for axis in (0, 1)
    )
    return rows, cols

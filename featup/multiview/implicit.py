"""The implicit upsampler: a small network fitted to each image from jittered views of it (FeatUp, section 3.3).

The network maps a position and its colour to a feature. It is fitted until the mean of its features over the patches
of a view's tokens, weighted by a learned attention, gives what the backbone says of that view, up to an uncertainty
that a learned linear map predicts from what the backbone says (equation 2). Like a NeRF samples rays, a step samples
tokens of all views and a few positions in each one's patch: its cost does not depend on the image's size, the patch's
or the number of views.

What is fitted is a residual over a feed-forward upsampler's map, so a fit starts where that one ends, and what goes
into that upsampler is not one view's coarse map but what all of them say together: the backbone's noise from patch to
patch averages out before anything is made finer. Features live in the space of a PCA of the whole data set: those of
different images can train one probe.

Images are fitted side by side, each with weights, views and samples of its own, drawn from its own generator: what
comes out for an image does not depend on its batch mates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.backbones import Backbone
from featup.errors import GeometryError
from featup.images import resize_images
from featup.kernels.resample import interpolation_taps, resample
from featup.multiview.back_projection import back_project, residual_taps, view_consistency
from featup.multiview.network import ImplicitNetwork, select_network
from featup.multiview.sampling import PatchPositions, centre_coordinates, image_generator, sample_tokens, scale_colours
from featup.multiview.views import Jitter, View, pool_views, warp
from featup.projection import PCA
from featup.training.losses import reconstruction
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, of_length, row_bands
from featup.upsamplers.interpolate import Interpolate

__all__ = ["Fit", "FitOptions", "Implicit"]


_VIEW_BATCH = 16


@dataclass(frozen=True)
class FitOptions:
    """How an image is fitted.

    ``views`` are fitted to and ``held_out`` more are kept to judge the fit by. ``steps`` of Adam see ``tokens`` tokens
    each and ``positions`` positions in the patch of each. ``width`` is that of the network's hidden layers,
    ``frequencies`` how many per coordinate are spread between ``exp(-2)`` and ``exp(highest)`` radians on coordinates
    scaled to [-0.5, 0.5]. ``magnitude`` and ``blur`` weigh the residual: its mean square, and the square of its mean
    over a token of the image itself, which pins the coarse features. ``pooling``, in cells of the backbone's grid, is
    how near a token of a view must be to a cell to count there, see :func:`featup.views.pool_views`; ``None`` starts
    from the coarse features of the image itself. With ``back_project``, what the patches of the fitted map miss of what
    the views say is interpolated, by a sharp cubic, and added to it, as much of it as it takes to explain views a
    little better, by ``margin`` of the error, than bilinear interpolation of the image's own features does: an
    edge-preserving upsampler averages out what tokens have of their own, which may be too much.

    Raises:
        GeometryError: a number that leaves nothing to fit.
    """

    steps: int = 20
    tokens: int = 256
    positions: int = 16
    views: int = 32
    held_out: int = 8
    jitter: Jitter = field(default_factory=lambda: Jitter(max_pad=20, zoom=(1.0, 1.0)))
    lr: float = 1e-3
    width: int = 128
    frequencies: int = 12
    highest: float = 3.5
    magnitude: float = 2.0
    blur: float = 0.0
    pooling: float | None = 0.3
    back_project: bool = True
    margin: float = 0.02
    seed: int = 0

    @property
    def judges(self) -> int:
        """Of the views to fit to, how many, the last ones, are kept to say how much to add back; of one view none."""
        return min(self.views - 1, max(1, self.views // 8)) if self.back_project else 0

    def __post_init__(self) -> None:
        whole = {name: getattr(self, name) for name in ("tokens", "positions", "views", "held_out", "width")}
        if min(*whole.values(), self.frequencies) < 1 or self.steps < 0 or self.lr <= 0:
            raise GeometryError(
                f"implicit: {whole}, frequencies={self.frequencies}, steps={self.steps}, lr={self.lr}: the first six "
                "must be at least 1, steps at least 0 and lr positive"
            )
        if self.pooling is not None and self.pooling <= 0:
            raise GeometryError(f"implicit: pooling={self.pooling} cells must be positive, or None for no pooling")
        if not 0 <= self.margin < 1:
            raise GeometryError(f"implicit: margin={self.margin} is a share of an error, at least 0 and below 1")


@dataclass(frozen=True, eq=False)
class Fit:
    """One image's fitted network, to be asked at any resolution.

    Attributes:
        explained_variance: Share of the variance of held-out views' features that the fit explains; 1 at best.
        before: The same for the map the fit started from.
        added_back: Share of what the fitted map misses of the views' means that :meth:`query` adds to it, see
            :class:`FitOptions`.
    """

    explained_variance: float
    before: float
    added_back: float
    _upsampler: "Implicit"
    _network: ImplicitNetwork
    _pooled: Tensor
    _missing: Tensor
    _image: Tensor
    _scale: Tensor
    _doubt: ChannelMap

    @torch.no_grad()
    def uncertainty(self, features: Tensor) -> Tensor:
        """How far the backbone's features of a view are off what the fit says of it, as the fit has learned to predict.

        Args:
            features: The backbone's, of the image or a view of it, ``[..., C]``.

        Returns:
            Standard deviation per component of the PCA, in the features' unit, ``[..., 1]``.
        """
        scaled = self._upsampler.pca.project(features) / self._scale[0]
        doubt = self._doubt.to(scaled)
        logarithm: Tensor = functional.linear(scaled, doubt.weight, doubt.bias)
        return logarithm.exp() * self._scale[0]

    @torch.no_grad()
    def query(
        self,
        size: tuple[int, int],
        window: tuple[int, int, int, int] | None = None,
        projection: ChannelMap | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Features at a resolution.

        Args:
            size: (height, width) of the whole map.
            window: (top, left, height, width) of the part wanted, in positions of that map; by default all of it.
            projection: From the backbone's channels to ``K``; by default to the space of the PCA.
            out: ``[height, width, K]`` to write into.

        Returns:
            ``[height, width, K]``.

        Raises:
            GeometryError: a window that reaches beyond the map.
        """
        top, left, height, width = window or (0, 0, *size)
        if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
            raise GeometryError(f"implicit: window {window} (top, left, height, width) reaches beyond a map of {size}")
        pca = self._upsampler.pca
        total = (pca.as_channel_map() if projection is None else projection).to(self._pooled)
        (base,) = self._upsampler.start(self._pooled, self._image, size, total)
        base = base[top : top + height, left : left + width]
        missing = self.added_back * functional.linear(self._missing, total.weight)
        # The residual has the unit of the features only here; what the PCA drops, the base alone gives.
        mixing = self._scale[0] * (total.weight @ pca.components.to(total.weight).T).T
        image = as_guidance(self._image, torch.float32)
        colours = scale_colours(image)
        rows, cols = (interpolation_taps("bilinear", image.shape[axis + 1], size[axis]) for axis in (0, 1))
        down_missing, across_missing = residual_taps(missing, size)
        across = centre_coordinates(size[1], image.device)[left : left + width]
        down = centre_coordinates(size[0], image.device)[top : top + height]
        if out is None:
            out = torch.empty_like(base)
        for band in row_bands((height, width), 1 << 14, image.device):
            some = slice(band.start + top, band.stop + top)
            part = resample(colours, rows[some], cols[left : left + width])
            grid = torch.stack(torch.meshgrid(down[band], across, indexing="ij"), -1)
            residual = self._network(grid.reshape(1, -1, 2), part.reshape(1, -1, 3))[0] @ mixing
            fitted = base[band] + residual.view(-1, width, base.shape[-1])
            if self.added_back:
                fitted += resample(missing, down_missing[some], across_missing[left : left + width])[0]
            out[band].copy_(fitted)
        return out


class Implicit(Upsampler):
    """Fits every image it is given, and answers with the fitted features; see the module.

    After a call, :attr:`fits` holds the fits of its images.
    """

    name = "implicit"

    def __init__(
        self,
        backbone: Backbone,
        pca: PCA,
        base: Upsampler,
        options: FitOptions | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            backbone: Whose features these are; it is asked for those of the views.
            pca: Of the data set: the space that is fitted.
            base: The feed-forward upsampler whose map the residual is added to.
            options: See :class:`FitOptions`.
            size: (height, width) of the images that the backbone is given; by default that of the guidance.
        """
        super().__init__()
        self.size = size
        self.backbone = backbone
        self.pca = pca
        self.options = options or FitOptions()
        self.base = base
        self.plain = Interpolate("bilinear")
        self.fits: list[Fit] = []

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        size: tuple[int, int],
        projection: ChannelMap | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Upsampler.forward`. The guidance is the uint8 image the features were made from,
        or that image at a larger size."""
        self.fits = self.fit(features, guidance)
        channels = features.shape[-1]
        if projection is None:
            projection = ChannelMap(torch.eye(channels).to(features), features.new_zeros(channels))
        if out is None:
            out = features.new_empty(len(features), *size, len(projection.bias))
        for row, fit in zip(out, self.fits, strict=True):
            fit.query(size, projection=projection, out=row)
        return out

    def fit(self, features: Tensor, guidance: Tensor) -> list[Fit]:
        """Fit images.

        Args:
            features: Their coarse features ``[B, h, w, C]``.
            guidance: The images, uint8 ``[B, H, W, 3]``, at the size the features were made from or a larger one.

        Returns:
            A fit for each.

        Raises:
            GeometryError: images that are not uint8, or whose features have another grid.
        """
        size = self.size or (guidance.shape[1], guidance.shape[2])
        grid = self.backbone.grid(size)
        if guidance.dtype != torch.uint8 or tuple(features.shape[1:3]) != grid or len(features) != len(guidance):
            raise GeometryError(
                f"implicit: need uint8 images [B, H, W, 3] and their features [B, {grid[0]}, {grid[1]}, C], got "
                f"{guidance.dtype} {tuple(guidance.shape)} and {tuple(features.shape)}; views are made of the image at "
                f"{size} (height, width), the size that the backbone is given"
            )
        # On a CPU a stack of networks saves nothing; and products of matrices round by the shape of the stack.
        group = len(guidance) if guidance.device.type == "cuda" else 1
        fits: list[Fit] = []
        with torch.inference_mode(False), torch.enable_grad():
            for start in range(0, len(guidance), max(1, group)):
                part = slice(start, start + group)
                fits += _fit(self, features[part].clone(), guidance[part].clone(), size)
        return fits

    @torch.no_grad()
    def start(self, features: Tensor, guidance: Tensor, size: tuple[int, int], total: ChannelMap) -> Tensor:
        """The map a fit starts from: the base's as far as that goes, linear between its positions beyond.

        Args:
            features: ``[B, h, w, C]``, pooled or not.
            guidance: See :meth:`fit`.
            size: (height, width) of the map.
            total: From the backbone's channels to ``K``.

        Returns:
            ``[B, height, width, K]``.
        """
        largest = self.base.largest((features.shape[1], features.shape[2])) or size
        reached = (min(size[0], largest[0]), min(size[1], largest[1]))
        made: Tensor = self.base(features, guidance, reached, total)
        if reached == size:
            return made
        rows, cols = (interpolation_taps("bilinear", reached[axis], size[axis]) for axis in (0, 1))
        return resample(made, rows, cols)


def _fit(upsampler: Implicit, features: Tensor, guidance: Tensor, size: tuple[int, int]) -> list[Fit]:
    options, backbone, pca = upsampler.options, upsampler.backbone, upsampler.pca
    images = resize_images(guidance, size)
    device, stride, count, jitter = images.device, backbone.stride, len(images), options.jitter
    grid = (features.shape[1], features.shape[2])
    generators = [image_generator(options.seed, image) for image in images]
    views = [jitter.sample(options.views + options.held_out, size, generator) for generator in generators]
    told = [_view_features(backbone, *pair, jitter) for pair in zip(images, views, strict=True)]
    pooled, means = _pooled(options, features, told, views, size)
    # [G, V, h, w, K]
    targets = torch.stack([pca.project(maps) for maps in told])
    base = upsampler.start(pooled, images, size, pca.as_channel_map().to(features))
    shown = options.views - options.judges
    scale = targets.flatten(1, -2).std(1).mean(-1).view(-1, 1, 1).clamp_min(1e-6)
    network = ImplicitNetwork(targets.shape[-1], count, options.width, options.frequencies, options.highest).to(device)
    for number, generator in enumerate(generators):
        network.draw(number, generator)
    attention = nn.Parameter(torch.zeros(count, targets.shape[-1], 1, device=device))
    taps = nn.Parameter(torch.zeros(count, stride[0] * stride[1], device=device))
    doubt = nn.Parameter(torch.zeros(count, targets.shape[-1], 1, device=device))
    doubt_level = nn.Parameter(torch.zeros(count, 1, 1, device=device))
    optimiser = torch.optim.Adam([*network.parameters(), attention, taps, doubt, doubt_level], options.lr)
    colours = scale_colours(as_guidance(images, torch.float32)).flatten(1, 2)
    base_rows = base.flatten(1, 2)
    origins = [PatchPositions(one[:shown], size, jitter.max_pad) for one in views]
    held = options.tokens * options.positions
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = options.lr * (1 - step / options.steps)
        drawn = [sample_tokens(options, shown, grid, stride, generator) for generator in generators]
        rows, cols = (torch.stack(one) for one in zip(*(o(*d[:3]) for o, d in zip(origins, drawn, strict=True)),
                                                      strict=True))  # fmt: skip
        rows, cols = rows.to(device), cols.to(device)
        at = (rows * size[1] + cols).view(count, held)
        positions = torch.stack([(rows + 0.5) / size[0] - 0.5, (cols + 0.5) / size[1] - 0.5], -1).view(count, held, 2)
        colour = colours.gather(1, at[..., None].expand(-1, -1, 3))
        residual = network(positions.float(), colour)
        values = base_rows.gather(1, at[..., None].expand(-1, -1, base_rows.shape[-1])) / scale + residual
        offsets = torch.stack([one[3] for one in drawn]).to(device).view(count, held)
        logits = (values @ attention).squeeze(-1) + taps.gather(1, offsets)
        weights = logits.view(count, options.tokens, options.positions, 1).softmax(2)
        seen = (values.view(count, options.tokens, options.positions, -1) * weights).sum(2)
        token = torch.stack([one[4] for one in drawn]).to(device)
        wanted = targets[:, :shown].flatten(1, 3).gather(1, token[..., None].expand(-1, -1, seen.shape[-1]))
        wanted = wanted / scale
        loss = reconstruction(seen, wanted, wanted @ doubt + doubt_level) + options.magnitude * residual.square().mean()
        if options.blur:
            patches = residual.view(count, options.tokens, options.positions, -1).mean(2)
            loss = loss + options.blur * patches.square().mean()
        optimiser.zero_grad(set_to_none=True)
        # The sum over the images: what one contributes to its weights' gradient does not depend on how many there are.
        (count * loss).backward()
        optimiser.step()
    fits = []
    for number in range(count):
        one = slice(number, number + 1)
        learned = ChannelMap(doubt[number].T.detach(), doubt_level[number, 0].detach())
        fit = Fit(
            explained_variance=0.0,
            before=0.0,
            added_back=0.0,
            _upsampler=upsampler,
            _network=select_network(network, number),
            _pooled=pooled[one],
            _missing=torch.zeros_like(pooled[one]),
            _image=guidance[one],
            _scale=scale[one],
            _doubt=learned,
        )
        if options.judges:
            fit = back_project(fit, means[one], features[one], views[number], targets[number], size)
        held_out = views[number][options.views :], targets[number, options.views :], jitter
        before, after = (float(view_consistency(maps, *held_out)) for maps in (base[number], fit.query(size)))
        fits.append(replace(fit, explained_variance=after, before=before))
    return fits


def _pooled(
    options: FitOptions, features: Tensor, told: list[Tensor], views: list[list[View]], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The images' coarse features ``[G, h, w, C]``, and what the views to fit to say beside them.

    Returns:
        What to start from: their means as long as the features are, which is what a probe takes them for; and the means
        themselves, which explain the views best.
    """
    if options.pooling is None:
        return features, features
    jitter, shown = options.jitter, slice(options.views - options.judges)
    kept, means = [], []
    for one, maps, drawn in zip(features, told, views, strict=True):
        seen, where = torch.cat([one[None], maps[shown]]), [jitter.identity, *drawn[shown]]
        pool = partial(pool_views, views=where, max_pad=jitter.max_pad, image_size=size, sigma=options.pooling)
        means.append(pool(seen))
        kept.append(of_length(means[-1], pool(seen.norm(dim=-1, keepdim=True))))
    return torch.stack(kept), torch.stack(means)


@torch.no_grad()
def _view_features(backbone: Backbone, image: Tensor, views: Sequence[View], jitter: Jitter) -> Tensor:
    """``[V, h, w, C]``: the backbone's features of the views of one image."""
    normalised = backbone.normalise(image[None]).permute(0, 2, 3, 1)
    found = []
    for start in range(0, len(views), _VIEW_BATCH):
        some = views[start : start + _VIEW_BATCH]
        shown = warp(normalised.expand(len(some), -1, -1, -1), some, jitter.max_pad)
        found.append(backbone.features(shown.permute(0, 3, 1, 2)))
    return torch.cat(found)

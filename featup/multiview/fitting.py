"""The fit of implicit networks to images (FeatUp, section 3.3): views, target features, and the optimisation.

A step samples tokens of the training views, and positions in the patch of each. The predicted feature of a token is
the mean of the map's features at its positions, weighted by a learned attention. Its target is the backbone's feature
of the view. A linear map of the target predicts the log sigma of the error (equation 2).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from featup.backbones import Backbone
from featup.images import resize_images
from featup.multiview.back_projection import back_project, view_consistency
from featup.multiview.fit import Fit, initial_map
from featup.multiview.network import ImplicitNetwork, scale_colours
from featup.multiview.options import FitOptions
from featup.multiview.sampling import PatchPositions, image_generator, sample_tokens
from featup.multiview.views import Jitter, View, average_views, warp
from featup.projection import PCA
from featup.training.losses import reconstruction
from featup.upsamplers.base import ChannelMap, Upsampler, as_guidance, rescale_to_norm

__all__ = ["fit_images"]

_VIEW_BATCH = 16


class _Model(nn.Module):
    """The parameters of a fit, for ``G`` images side by side: network, attention and log sigma."""

    def __init__(self, network: ImplicitNetwork, channels: int, taps: int) -> None:
        super().__init__()
        images = len(network.biases)
        self.network = network
        self.attention = nn.Parameter(torch.zeros(images, channels, 1))
        self.taps = nn.Parameter(torch.zeros(images, taps))
        self.log_sigma_weight = nn.Parameter(torch.zeros(images, channels, 1))
        self.log_sigma_bias = nn.Parameter(torch.zeros(images, 1, 1))

    def log_sigma(self, image: int) -> ChannelMap:
        """The learned map from scaled features of one image to their log sigma."""
        return ChannelMap(self.log_sigma_weight[image].T.detach(), self.log_sigma_bias[image, 0].detach())


def fit_images(
    backbone: Backbone,
    pca: PCA,
    base: Upsampler,
    options: FitOptions,
    features: Tensor,
    guidance: Tensor,
    size: tuple[int, int],
) -> list[Fit]:
    """Fit a stack of networks, one for each image.

    Args:
        backbone: Computes the features of the views.
        pca: The space of the networks' output.
        base: The feed-forward upsampler of the initial maps.
        options: Of the fits.
        features: Coarse features of the images ``[G, h, w, C]``.
        guidance: The images, uint8 ``[G, H, W, 3]``.
        size: (height, width) of the images that the backbone takes.

    Returns:
        A fit for each image.
    """
    images = resize_images(guidance, size)
    jitter = options.jitter
    generators = [image_generator(options.seed, image) for image in images]
    views = [jitter.sample(options.views + options.held_out, size, generator) for generator in generators]
    view_features = [_view_features(backbone, *pair, jitter) for pair in zip(images, views, strict=True)]
    initial_features, averages = _initial_features(options, features, view_features, views, size)
    targets = torch.stack([pca.project(maps) for maps in view_features])  # [G, V, h, w, K]
    initial = initial_map(base, initial_features, images, size, pca.as_channel_map().to(features))
    scale = targets.flatten(1, -2).std(1).mean(-1).view(-1, 1, 1).clamp_min(1e-6)
    channels = targets.shape[-1]
    network = ImplicitNetwork(channels, len(images), options.width, options.frequencies, options.highest)
    model = _Model(network, channels, backbone.stride[0] * backbone.stride[1]).to(images.device)
    for number, generator in enumerate(generators):
        network.initialise(number, generator)
    _optimise(model, options, images, initial, targets[:, : options.training_views], scale, views, generators)
    fits = []
    for number in range(len(images)):
        image = slice(number, number + 1)
        fit = Fit(
            explained_variance=0.0,
            initial_explained_variance=0.0,
            blend_weight=0.0,
            pca=pca,
            base=base,
            network=network.select(number),
            features=initial_features[image],
            residual=torch.zeros_like(initial_features[image]),
            image=guidance[image],
            scale=scale[image],
            log_sigma=model.log_sigma(number),
        )
        if options.validation_views:
            fit = back_project(fit, averages[image], features[image], views[number], targets[number], options, size)
        held_out = views[number][options.views :], targets[number, options.views :], jitter
        before, after = (float(view_consistency(maps, *held_out)) for maps in (initial[number], fit.query(size)))
        fits.append(replace(fit, explained_variance=after, initial_explained_variance=before))
    return fits


def _optimise(
    model: _Model,
    options: FitOptions,
    images: Tensor,
    initial: Tensor,
    targets: Tensor,
    scale: Tensor,
    views: Sequence[Sequence[View]],
    generators: Sequence[torch.Generator],
) -> None:
    """Fit the model to the training views.

    Args:
        model, options: What to fit, and how.
        images: uint8 ``[G, H, W, 3]``.
        initial: The initial maps ``[G, H, W, K]``.
        targets: Features of the training views ``[G, V, h, w, K]``.
        scale: Their standard deviations ``[G, 1, 1]``.
        views: Of each image; the training views come first.
        generators: The source of each image's samples.
    """
    count, size, device = len(images), (images.shape[1], images.shape[2]), images.device
    grid = (targets.shape[2], targets.shape[3])
    stride = (size[0] // grid[0], size[1] // grid[1])
    optimiser = torch.optim.Adam(model.parameters(), options.lr)
    colours = scale_colours(as_guidance(images, torch.float32)).flatten(1, 2)
    initial = initial.flatten(1, 2)
    to_pixels = [
        PatchPositions(image_views[: options.training_views], size, options.jitter.max_pad) for image_views in views
    ]
    points = options.tokens * options.positions

    def by_token(values: Tensor) -> Tensor:
        """``[G, T * P, D]`` to ``[G, T, P, D]``."""
        return values.view(count, options.tokens, options.positions, -1)

    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = options.lr * (1 - step / options.steps)
        samples = [
            sample_tokens(options.tokens, options.positions, options.training_views, grid, stride, generator)
            for generator in generators
        ]
        pixels = [origin(sample) for origin, sample in zip(to_pixels, samples, strict=True)]
        rows, cols = (torch.stack(axis).to(device) for axis in zip(*pixels, strict=True))
        index = (rows * size[1] + cols).view(count, points)[..., None]
        positions = torch.stack([(rows + 0.5) / size[0] - 0.5, (cols + 0.5) / size[1] - 0.5], -1)
        output = model.network(positions.view(count, points, 2).float(), colours.gather(1, index.expand(-1, -1, 3)))
        values = initial.gather(1, index.expand(-1, -1, initial.shape[-1])) / scale + output
        taps = torch.stack([sample.tap for sample in samples]).to(device).view(count, points)
        logits = (values @ model.attention).squeeze(-1) + model.taps.gather(1, taps)
        predicted = (by_token(values) * by_token(logits).softmax(2)).sum(2)
        token = torch.stack([sample.token for sample in samples]).to(device)[..., None]
        target = targets.flatten(1, 3).gather(1, token.expand(-1, -1, predicted.shape[-1])) / scale
        log_sigma = target @ model.log_sigma_weight + model.log_sigma_bias
        loss = reconstruction(predicted, target, log_sigma) + options.magnitude * output.square().mean()
        if options.blur:
            loss = loss + options.blur * by_token(output).mean(2).square().mean()
        optimiser.zero_grad(set_to_none=True)
        # The sum over the images, so that an image's gradient does not depend on their number.
        (count * loss).backward()
        optimiser.step()


def _initial_features(
    options: FitOptions,
    features: Tensor,
    view_features: Sequence[Tensor],
    views: Sequence[Sequence[View]],
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The features that the base upsamples, and the multi-view averages, ``[G, h, w, C]`` each.

    The first are the averages rescaled to the norms of the features: a probe needs these norms. The averages
    themselves explain the views best. Without averaging both are the single-view features.
    """
    if options.averaging_sigma is None:
        return features, features
    training = slice(options.training_views)
    renormalised, averages = [], []
    for image_features, maps, image_views in zip(features, view_features, views, strict=True):
        all_maps = torch.cat([image_features[None], maps[training]])
        average = partial(
            average_views,
            views=[options.jitter.identity, *image_views[training]],
            max_pad=options.jitter.max_pad,
            image_size=size,
            sigma=options.averaging_sigma,
        )
        averages.append(average(all_maps))
        renormalised.append(rescale_to_norm(averages[-1], average(all_maps.norm(dim=-1, keepdim=True))))
    return torch.stack(renormalised), torch.stack(averages)


@torch.no_grad()
def _view_features(backbone: Backbone, image: Tensor, views: Sequence[View], jitter: Jitter) -> Tensor:
    """``[V, h, w, C]``: the backbone's features of the views of one image."""
    normalised = backbone.normalise(image[None]).permute(0, 2, 3, 1)
    batches = []
    for start in range(0, len(views), _VIEW_BATCH):
        batch = views[start : start + _VIEW_BATCH]
        warped = warp(normalised.expand(len(batch), -1, -1, -1), batch, jitter.max_pad)
        batches.append(backbone.features(warped.permute(0, 3, 1, 2)))
    return torch.cat(batches)

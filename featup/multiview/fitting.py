"""The fit of an implicit network to the views of an image (FeatUp, section 3.3): the model, its loss, its steps.

The network's map, with the norm of its features as one more channel, is warped by a view and downsampled by an
attention over windows; the result must match the backbone's feature of each token. A linear map of the target predicts
the log sigma of the error (equation 2). A step compares all tokens of some views, or tokens sampled from all views.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional

from featup.multiview.downsamplers import AttentionDownsampler, gaussian_blur
from featup.multiview.network import ImplicitNetwork, pixel_coordinates
from featup.multiview.options import ImplicitOptions
from featup.multiview.sampling import ViewPositions, sample_tokens
from featup.multiview.views import View, warp
from featup.training.losses import explained_variance, reconstruction, total_variation

__all__ = ["FitModel", "fit_steps", "views_explained"]

_CROP = 16
_LOG_SIGMA = 0.1
_WARM_START_ROWS = 32
_WARM_START_TOKENS = 8192
_WARM_START_POSITIONS = 64
_WARM_START_CHUNK = 1024
_WARM_START_ROUNDS = 3
_RIDGE = 1e-3
# Shares of half the grid's sampling rate above which frequencies are damped: of row, column and the three colours.
_CUTOFFS = (0.35, 0.35, 0.1, 0.1, 0.1)


class FitModel(nn.Module):
    """Everything that is fitted to an image: the network, the downsampler, and the log sigma of the error."""

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        size: tuple[int, int],
        options: ImplicitOptions,
        generator: torch.Generator,
    ) -> None:
        """
        Args:
            channels: K of the features.
            grid, size: (height, width) of a view, in tokens and in pixels.
            options: Of the fit.
            generator: Of the initial weights.
        """
        super().__init__()
        self.grid = grid
        self.network = ImplicitNetwork(channels, options.frequencies, options.lowest, options.highest, generator)
        (height, down), (width, across) = (_window(size[axis], grid[axis], options.kernel) for axis in (0, 1))
        self.downsampler = AttentionDownsampler(channels + 1, (height, width), (down, across), padding="valid")
        self.log_sigma = nn.Linear(channels, 1)
        for linear, factor in ((self.downsampler.attention, 1.0), (self.log_sigma, 0.1)):
            bound = factor * linear.in_features**-0.5
            for parameter in linear.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator)
        with torch.no_grad():
            self.log_sigma.bias.add_(_LOG_SIGMA)
        self.downsampler.perturb_taps(generator)


def fit_steps(
    model: FitModel,
    options: ImplicitOptions,
    colours: Tensor,
    views: Sequence[View],
    targets: Tensor,
    generator: torch.Generator,
) -> Iterator[int]:
    """Fit a model to the views of an image, a step at a time.

    Args:
        model: To fit, on the device of the colours.
        options: Of the fit.
        colours: Of the image, scaled to [-0.5, 0.5], ``[H, W, 3]``.
        views: ``V`` views of the image.
        targets: Their features ``[V, h, w, K]``.
        generator: The source of samples and dropout.

    Yields:
        How many steps are done: 0 with the initial model, and one more after each step.
    """
    steps = _SampledSteps if options.tokens else _WholeSteps
    step = steps(model, options, colours, views, targets, generator)
    if options.warm_start and isinstance(step, _SampledSteps):
        step.warm_start()
    optimiser = torch.optim.NAdam(model.parameters(), options.lr)
    yield 0
    for number in range(options.steps):
        if options.lr_decay:
            for group in optimiser.param_groups:
                group["lr"] = options.lr * (1 - number / options.steps)
        optimiser.zero_grad(set_to_none=True)
        step.backward()
        optimiser.step()
        yield number + 1


@torch.no_grad()
def views_explained(model: FitModel, maps: Tensor, views: Sequence[View], targets: Tensor, max_pad: int) -> float:
    """The explained variance of views' features by a map through the model's downsampler.

    Args:
        model: That was fitted.
        maps: The network's map ``[H, W, K]``.
        views, targets: Views and their features ``[V, h, w, K]``.
        max_pad: Of the jitter that the views were sampled from.
    """
    both = _with_norm(maps)[None]
    down = model.downsampler
    predicted = []
    for view in views:
        warped = warp(both, [view], max_pad)
        logits = functional.linear(warped, down.attention.weight, down.attention.bias)
        predicted.append(down(warped[..., :-1], logits, model.grid))
    return float(explained_variance(torch.cat(predicted).double(), targets.double()))


class _Steps:
    """The loss of one step after the other, and its gradient."""

    def __init__(
        self,
        model: FitModel,
        options: ImplicitOptions,
        colours: Tensor,
        views: Sequence[View],
        targets: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.model, self.options, self.generator = model, options, generator
        self.colours, self.views, self.targets = colours, views, targets
        self.size = (colours.shape[0], colours.shape[1])
        rows, cols = (
            pixel_coordinates(torch.arange(side, device=colours.device), side).to(colours) for side in self.size
        )
        self.positions = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1)

    def backward(self) -> None:
        """Add the gradient of the next step's loss to the parameters."""
        raise NotImplementedError

    def kept(self, *shape: int) -> Tensor:
        """See :meth:`AttentionDownsampler.sample_kept`."""
        return self.model.downsampler.sample_kept(self.options.dropout, self.generator, *shape).to(self.colours)

    def consistency(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The loss of predicted features ``[..., K + 1]``, the downsampled norm last, to targets ``[..., K]``."""
        likelihood = reconstruction(predicted[..., :-1], target, self.model.log_sigma(target))
        norms = torch.linalg.vector_norm(target, dim=-1)
        loss: Tensor = likelihood + self.options.magnitude * (predicted[..., -1] - norms).square().mean()
        return loss

    def smoothness(self, both: Tensor, border: int) -> Tensor:
        """The regularisers of a map ``[1, H, W, K + 1]``, the norm last; the blur leaves a border out."""
        inner = slice(border, -border or None)
        values = both[..., :-1]
        difference = (gaussian_blur(values) - values)[:, inner, inner]
        loss: Tensor = self.options.total_variation * total_variation(both[..., -1:])
        return loss + self.options.blur_pin * difference.square().mean()


class _WholeSteps(_Steps):
    """Steps on all tokens of some views: the network is evaluated at every pixel, as in the paper."""

    def backward(self) -> None:
        options, model = self.options, self.model
        masks = model.network.dropout_masks(options.dropout, self.generator)
        graph = _with_norm(model.network(self.positions, self.colours, masks))[None]
        # View by view from a leaf: the memory of a step does not depend on the number of its views.
        both = graph.detach().requires_grad_()
        self.smoothness(both, 0).backward()  # type: ignore[no-untyped-call]
        for number in torch.randint(len(self.views), (options.step_views,), generator=self.generator).tolist():
            warped = warp(both, [self.views[number]], options.max_pad)
            weight = model.downsampler.sample_logit_weight(options.dropout, self.generator)
            logits = functional.linear(warped, weight, model.downsampler.attention.bias)
            predicted = model.downsampler(warped, logits, model.grid, self.kept(1, *model.grid))
            loss = self.consistency(predicted, self.targets[number][None]) / options.step_views
            loss.backward()  # type: ignore[no-untyped-call]
        graph.backward(both.grad)  # type: ignore[no-untyped-call]


class _SampledSteps(_Steps):
    """Steps on sampled tokens and positions: the cost does not depend on the size of the image."""

    @cached_property
    def to_pixels(self) -> ViewPositions:
        """From positions in the views to pixels of the image."""
        return ViewPositions(self.views, self.size, self.options.max_pad)

    def sample(self, tokens: int, positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, columns and taps of positions ``[T, P]``, and the targets ``[T, K]`` of their tokens."""
        down = self.model.downsampler
        views, grid = len(self.views), self.model.grid
        sample = sample_tokens(tokens, positions, views, grid, down.kernel, down.stride, self.generator)
        rows, cols = (axis.to(self.colours.device) for axis in self.to_pixels(sample))
        target = self.targets.flatten(0, 2)[sample.token.to(self.targets.device)]
        return rows, cols, sample.tap.to(rows), target

    def backward(self) -> None:
        options, model = self.options, self.model
        masks = model.network.dropout_masks(options.dropout, self.generator)
        assert options.tokens is not None
        rows, cols, taps, target = self.sample(options.tokens, options.positions)
        positions, colours = self.positions[rows, cols], self.colours[rows, cols]
        top, left = (int(torch.randint(max(1, side - _CROP + 1), (), generator=self.generator)) for side in self.size)
        crop = slice(top, top + _CROP), slice(left, left + _CROP)
        crop_positions, crop_colours = self.positions[crop], self.colours[crop]
        # One pass through the network for both.
        together = (
            torch.cat([part.flatten(0, -2) for part in parts])
            for parts in ((positions, crop_positions), (colours, crop_colours))
        )
        both = _with_norm(model.network(*together, masks))
        count = taps.numel()
        values, cropped = both[:count].view(*taps.shape, -1), both[count:].view(1, *crop_positions.shape[:2], -1)
        weight = model.downsampler.sample_logit_weight(options.dropout, self.generator)
        logits = functional.linear(values, weight, model.downsampler.attention.bias).squeeze(-1)
        logits = logits * self.kept(len(taps), 1)
        scale, bias = (each.flatten()[taps] for each in (model.downsampler.scale, model.downsampler.bias))
        predicted = torch.einsum("tpk,tp->tk", values, (logits * scale + bias).softmax(-1))
        loss = self.consistency(predicted, target) + self.smoothness(cropped, 2)
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def warm_start(self) -> None:
        """Initialise the last layer by the closed form that minimises the loss of the initial activations.

        High frequencies are damped in the first layer, in proportion: they carry more noise between pixels than
        signal. Those of colours are damped from lower ones on, because texture that a patch averages out would else
        become features. Training may raise them again.

        For mean activations of windows the reconstruction is a least-squares problem, weighted by the variance of its
        error. Two terms keep the layer from fitting what the windows do not see. The blur pin is quadratic in the
        layer. The total variation of the norms is not: with its weight, the mean square of the differences between
        neighbours stands for it. The attention starts uniform, which the closed form assumes.
        """
        network = self.model.network
        nyquist = pi / 2 * max(self.model.grid)
        by_axis = [(cutoff * nyquist / network.frequencies).clamp_max(1) for cutoff in _CUTOFFS]
        damping = torch.stack(by_axis, -1).flatten()
        columns = torch.cat([damping, damping, damping.new_ones(3)])
        network.first.weight.mul_(columns / columns.square().mean().sqrt())
        tiles = zip(
            torch.split(self.positions, _WARM_START_ROWS), torch.split(self.colours, _WARM_START_ROWS), strict=True
        )
        hidden = torch.cat([network.hidden(*tile) for tile in tiles])
        pin = self.options.blur_pin * _mean_square(gaussian_blur(hidden[None])[0] - hidden)
        for axis in (0, 1):
            pin += self.options.total_variation * _mean_square(hidden.diff(dim=axis))
        rows, cols, _, target = self.sample(_WARM_START_TOKENS, _WARM_START_POSITIONS)
        pairs = zip(torch.split(rows, _WARM_START_CHUNK), torch.split(cols, _WARM_START_CHUNK), strict=True)
        windows = torch.cat([hidden[pair].mean(1) for pair in pairs]).double()
        mean, target_mean = windows.mean(0), target.double().mean(0)
        windows, target = windows - mean, target.double() - target_mean
        gram, moment = windows.T @ windows / len(windows), windows.T @ target / len(windows)
        variance = target.square().mean()
        for _ in range(_WARM_START_ROUNDS):
            matrix = gram / (2 * variance) + pin
            matrix += _RIDGE * matrix.trace() / len(matrix) * torch.eye(len(matrix)).to(matrix)
            weight = torch.linalg.solve(matrix, moment / (2 * variance))
            variance = (target - windows @ weight).square().mean().clamp_min(1e-6)
        network.last.weight.copy_(weight.T)
        network.last.bias.copy_(target_mean - mean @ weight)
        self.model.log_sigma.weight.zero_()
        self.model.log_sigma.bias.fill_(float(variance.log() / 2))
        self.model.downsampler.attention.weight.zero_()
        self.model.downsampler.attention.bias.zero_()


def _mean_square(activations: Tensor) -> Tensor:
    """The mean over positions of the outer products of ``[H, W, K]``: ``[K, K]``, in float64; of no position zeros."""
    flat = activations.flatten(0, 1).double()
    return flat.T @ flat / max(1, len(flat))


def _with_norm(features: Tensor) -> Tensor:
    """``[..., K]`` with the norm as one more channel; its gradient at zero is zero."""
    return torch.cat([features, torch.linalg.vector_norm(features, dim=-1, keepdim=True)], -1)


def _window(side: int, cells: int, kernel: int | None) -> tuple[int, int]:
    """Kernel and stride along an axis of windows that cover it, the first from its start and the last to its end.

    By default the window is as wide as the original's, 29 pixels for 14 patches of 16 and for 16 patches of 14. A
    kernel larger than three patches, where the patches are small, would blur more than it aligns: there it is a patch.
    """
    patch = side // cells
    if cells == 1:
        return side, side
    stride = max(1, min((side - (kernel or 2 * patch - 3)) // (cells - 1), patch))
    covering = side - (cells - 1) * stride
    if kernel is None and covering > 3 * patch:
        return patch + side % cells, patch
    return covering, stride

"""The implicit network: Fourier features of position and colour through a small MLP, a stack of one per image."""

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ImplicitNetwork"]


class ImplicitNetwork(nn.Module):
    """Fourier features of position and colour through a normalised MLP; a stack of them, one for each image.

    Every coordinate is multiplied by each frequency and shifted by a learned bias before its sine and its cosine are
    taken; the colour itself follows. Each hidden layer is preceded by a layer normalisation and followed by a ReLU,
    but for the last, which is linear.
    """

    def __init__(
        self, channels: int, images: int = 1, width: int = 128, frequencies: int = 12, highest: float = 5.0
    ) -> None:
        """
        Args:
            channels: K of the features.
            images: How many networks there are.
            width: Of the two hidden layers.
            frequencies, highest: See :class:`FitOptions`.
        """
        super().__init__()
        inputs = 10 * frequencies + 3
        self.register_buffer("frequencies", torch.linspace(-2, highest, frequencies).exp(), persistent=False)
        self.frequencies: Tensor
        self.biases = nn.Parameter(torch.zeros(images, 2, frequencies, 5))
        self.scale_in = nn.Parameter(torch.ones(images, 1, inputs))
        self.shift_in = nn.Parameter(torch.zeros(images, 1, inputs))
        self.scale_hidden = nn.Parameter(torch.ones(images, 1, width))
        self.shift_hidden = nn.Parameter(torch.zeros(images, 1, width))
        sizes = ((inputs, width), (width, width), (width, channels))
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(images, *size)) for size in sizes)
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(images, 1, size)) for _, size in sizes)

    def draw(self, image: int, generator: torch.Generator) -> None:
        """New weights for one image: Gaussian biases of the frequencies, fan-in scaled layers, the last one zero."""
        with torch.no_grad():
            drawn = torch.randn(self.biases.shape[1:], generator=generator)
            self.biases[image] = drawn.to(self.biases)
            for weight, offset in zip(list(self.weights)[:-1], list(self.offsets)[:-1], strict=True):
                bound = weight.shape[1] ** -0.5
                for parameter in (weight, offset):
                    uniform = torch.rand(parameter.shape[1:], generator=generator) * 2 - 1
                    parameter[image] = (uniform * bound).to(parameter)

    def forward(self, positions: Tensor, colours: Tensor) -> Tensor:
        """Positions ``[G, N, 2]`` (row, column) and colours ``[G, N, 3]``, scaled to [-0.5, 0.5] over the image.

        Returns:
            Features ``[G, N, K]``.
        """
        at = torch.cat([positions, colours], -1)[:, :, None, :] * self.frequencies[:, None]
        waves = [(at + self.biases[:, part, None]).flatten(2) for part in (0, 1)]
        hidden = torch.cat([waves[0].sin(), waves[1].cos(), colours], -1)
        hidden = functional.layer_norm(hidden, hidden.shape[-1:]) * self.scale_in + self.shift_in
        hidden = torch.baddbmm(self.offsets[0], hidden, self.weights[0]).relu()
        hidden = functional.layer_norm(hidden, hidden.shape[-1:]) * self.scale_hidden + self.shift_hidden
        hidden = torch.baddbmm(self.offsets[1], hidden, self.weights[1]).relu()
        features: Tensor = torch.baddbmm(self.offsets[2], hidden, self.weights[2])
        return features


def select_network(network: ImplicitNetwork, image: int) -> ImplicitNetwork:
    """The network of one image of the stack."""
    channels, width = network.weights[2].shape[2], network.weights[2].shape[1]
    alone = ImplicitNetwork(channels, 1, width, len(network.frequencies), log(float(network.frequencies[-1])))
    alone.load_state_dict({name: value[image : image + 1] for name, value in network.state_dict().items()})
    return alone.to(network.biases.device).requires_grad_(False)

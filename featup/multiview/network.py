"""The implicit network and its inputs: Fourier features of position and colour through a small MLP."""

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ImplicitNetwork", "centre_coordinates", "scale_colours"]


class ImplicitNetwork(nn.Module):
    """A stack of networks, one for each image: Fourier features of position and colour through a normalised MLP.

    Every coordinate is multiplied by each frequency and shifted by a learned bias before its sine and its cosine are
    taken. The colours themselves follow as three more inputs. A layer normalisation precedes each hidden layer and a
    ReLU follows it. The last layer is linear.
    """

    def __init__(
        self, channels: int, images: int = 1, width: int = 128, frequencies: int = 12, highest: float = 5.0
    ) -> None:
        """
        Args:
            channels: K of the features.
            images: Number of networks.
            width: Units of the two hidden layers.
            frequencies, highest: See :class:`featup.multiview.options.FitOptions`.
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

    def initialise(self, image: int, generator: torch.Generator) -> None:
        """Initialise the network of one image: Gaussian biases, layers scaled by their fan-in, the last layer zero."""
        with torch.no_grad():
            self.biases[image] = torch.randn(self.biases.shape[1:], generator=generator).to(self.biases)
            for weight, offset in zip(list(self.weights)[:-1], list(self.offsets)[:-1], strict=True):
                bound = weight.shape[1] ** -0.5
                for parameter in (weight, offset):
                    uniform = torch.rand(parameter.shape[1:], generator=generator) * 2 - 1
                    parameter[image] = (uniform * bound).to(parameter)

    def forward(self, positions: Tensor, colours: Tensor) -> Tensor:
        """
        Args:
            positions: ``[G, N, 2]``, (row, column), scaled to [-0.5, 0.5] over the image.
            colours: ``[G, N, 3]``, scaled to [-0.5, 0.5] over the image.

        Returns:
            Features ``[G, N, K]``.
        """
        coordinates = torch.cat([positions, colours], -1)[:, :, None, :]
        angles = coordinates * self.frequencies[:, None]
        waves = [(angles + self.biases[:, part, None]).flatten(2) for part in (0, 1)]
        hidden = torch.cat([waves[0].sin(), waves[1].cos(), colours], -1)
        hidden = functional.layer_norm(hidden, hidden.shape[-1:]) * self.scale_in + self.shift_in
        hidden = torch.baddbmm(self.offsets[0], hidden, self.weights[0]).relu()
        hidden = functional.layer_norm(hidden, hidden.shape[-1:]) * self.scale_hidden + self.shift_hidden
        hidden = torch.baddbmm(self.offsets[1], hidden, self.weights[1]).relu()
        features: Tensor = torch.baddbmm(self.offsets[2], hidden, self.weights[2])
        return features

    def select(self, image: int) -> "ImplicitNetwork":
        """A frozen copy of the network of one image, as a stack of one."""
        channels, width = self.weights[2].shape[2], self.weights[2].shape[1]
        network = ImplicitNetwork(channels, 1, width, len(self.frequencies), log(float(self.frequencies[-1])))
        network.load_state_dict({name: value[image : image + 1] for name, value in self.state_dict().items()})
        return network.to(self.biases.device).requires_grad_(False)


def scale_colours(image: Tensor) -> Tensor:
    """``[B, H, W, 3]`` scaled per image and channel to [-0.5, 0.5]."""
    least, most = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return (image - least) / (most - least).clamp_min(1e-4) - 0.5


def centre_coordinates(count: int, device: torch.device) -> Tensor:
    """Centres of ``count`` positions along an axis scaled to [-0.5, 0.5]."""
    return (torch.arange(count, device=device) + 0.5) / count - 0.5

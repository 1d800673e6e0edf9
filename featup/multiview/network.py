"""The implicit network and its inputs: Fourier features of position and colour through a small MLP."""

import torch
from torch import Tensor, nn

__all__ = ["ImplicitNetwork", "pixel_coordinates"]


class ImplicitNetwork(nn.Module):
    """Fourier features of position and colour through a normalised MLP (FeatUp, section 3.3).

    Every coordinate is multiplied by each frequency and shifted by a learned bias before its sine and its cosine are
    taken. The colours themselves follow as three more inputs. Two hidden layers with a ReLU have the width of the
    output; a layer normalisation precedes each of them. The last layer is linear.
    """

    def __init__(
        self,
        channels: int,
        frequencies: int = 30,
        lowest: float = -2.0,
        highest: float = 10.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """
        Args:
            channels: K of the features.
            frequencies, lowest, highest: See :class:`featup.multiview.options.ImplicitOptions`.
            generator: Of the initial weights; by default torch's own.
        """
        super().__init__()
        inputs = 10 * frequencies + 3
        self.register_buffer("frequencies", torch.linspace(lowest, highest, frequencies).exp(), persistent=False)
        self.frequencies: Tensor
        self.biases = nn.Parameter(torch.randn(2, frequencies, 5, generator=generator))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in (inputs, channels))
        sizes = ((inputs, channels), (channels, channels), (channels, channels))
        self.first, self.second, self.last = (nn.Linear(*size) for size in sizes)
        for layer in (self.first, self.second, self.last):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator)

    def hidden(self, positions: Tensor, colours: Tensor, masks: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The activations of the second hidden layer; see :meth:`forward`."""
        coordinates = torch.cat([positions, colours], -1)[..., None, :]
        angles = coordinates * self.frequencies[:, None]
        waves = [(angles + bias).flatten(-2) for bias in self.biases]
        hidden = torch.cat([waves[0].sin(), waves[1].cos(), colours], -1)
        hidden = self.norms[0](hidden)
        if masks is not None:
            hidden = hidden * masks[0]
        hidden = self.first(hidden).relu()
        if masks is not None:
            hidden = hidden * masks[1]
        activations: Tensor = self.second(self.norms[1](hidden)).relu()
        return activations

    def forward(self, positions: Tensor, colours: Tensor, masks: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """
        Args:
            positions: ``[..., 2]``, (row, column), from -1 at the first pixel to 1 at the last.
            colours: ``[..., 3]``, scaled to [-0.5, 0.5] over the image.
            masks: Dropout, of the normalised inputs and of the first hidden layer, from :meth:`dropout_masks`.

        Returns:
            Features ``[..., K]``.
        """
        features: Tensor = self.last(self.hidden(positions, colours, masks))
        return features

    def dropout_masks(self, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample dropout of whole channels, the same at all positions, ``[inputs]`` and ``[K]``."""
        first, second = (
            (torch.rand(layer.in_features, generator=generator) >= rate).to(self.biases) / (1 - rate)
            for layer in (self.first, self.second)
        )
        return first, second


def pixel_coordinates(pixels: Tensor, side: int) -> Tensor:
    """Positions along an axis in pixels, whole at their centres, scaled to [-1, 1] from the first to the last."""
    return 2 * pixels / max(1, side - 1) - 1

"""The architecture ends in an average over positions, where most small nets here end in wide linear layers."""

from torch import nn

from simulator.models.architectures import Architecture


def nin(channels: int, size: int, classes: int, width: int = 32) -> tuple[nn.Module, nn.Linear]:  # noqa: ARG001
    """Body and last linear layer of a small Network in Network.

    The body takes ``(B, channels, size, size)`` and gives ``(B, width)``: two 3x3 convolutions, each followed by a 1x1
    convolution over its channels, and the mean over all positions. Any ``size`` from 4 pixels will do.

    Example: ``nin(1, 12, 10)`` is a net for the digits, of about 12,000 weights.
    """

    def block(inputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]

    body = nn.Sequential(*block(channels), nn.MaxPool2d(2), *block(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return body, nn.Linear(width, classes)


NIN = Architecture("nin", nin, "Network in Network, 2 blocks (Lin et al., ICLR 2014)", smallest=4)

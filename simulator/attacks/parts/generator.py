"""The image generator of data-free attacks: DFME's, for images of any size.

    z ~ N(0, I) → linear → BN → ×2 → conv 128 → BN → LReLU → ×2 → conv 64 → BN → LReLU → conv C → BN (not affine) → tanh

as in Truong et al. (CVPR 2021) and, before them, Fang et al. (arXiv:1912.11006), who have it for sides divisible by 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stretch(kernel: Tensor) -> Tensor:
    """The kernel of ``conv_transpose2d`` (stride 2, padding 1) that equals nearest ×2 and then ``kernel``, padded by 1.

    A 3x3 convolution of a doubled map sees each of its values two to four times. Summing the weights that meet the same
    value gives four 2x2 kernels, one a phase of the output, together a transposed 4x4 one: ``(O, I, 3, 3)`` to
    ``(I, O, 4, 4)``. The map is then never doubled, and 16 products are made where it were 36.
    """
    kernel = F.pad(kernel.flip(2, 3), (1, 1, 1, 1))
    kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
    kernel = kernel[..., 1:] + kernel[..., :-1]
    return kernel.transpose(0, 1).contiguous(memory_format=torch.channels_last)


class DoublingConvolution(nn.Conv2d):
    """Nearest-neighbour ×2 and a 3x3 convolution, in one pass (see :func:`stretch`), cut to ``side`` x ``side``."""

    def __init__(self, channels: int, out: int, side: tuple[int, int]) -> None:
        super().__init__(channels, out, 3, padding=1)
        self.side = side

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, out, *side)``, with each side 2H or 2H - 1."""
        maps = F.conv_transpose2d(maps, stretch(self.weight), self.bias, stride=2, padding=1)
        if maps.shape[2:] == self.side:
            return maps
        return maps[:, :, : self.side[0], : self.side[1]].contiguous(memory_format=torch.channels_last)


class ImageGenerator(nn.Module):
    """Makes images of ``shape`` ``(C, H, W)``, of any size, out of noise.

    Maps grow from a quarter of the image's side to the half and the whole; sides that are no whole number are rounded
    up, and a doubled map is cut to its next side.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int = 256, width: int = 128) -> None:
        super().__init__()
        channels, *sides = shape
        whole, half, quarter = ((-(-sides[0] // part), -(-sides[1] // part)) for part in (1, 2, 4))
        self.latent, self.start = latent, (width, *quarter)
        self.project = nn.Linear(latent, width * quarter[0] * quarter[1])
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width),
            DoublingConvolution(width, width, half),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            DoublingConvolution(width, width // 2, whole),
            nn.BatchNorm2d(width // 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.BatchNorm2d(channels, affine=False),
        )

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Inputs for ``count`` images: ``(count, latent)``, standard normal, on this network's device."""
        return torch.randn(count, self.latent, generator=generator).to(self.project.weight.device)

    def forward(self, noise: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` before the last tanh, from ``(B, latent)``."""
        maps = self.project(noise).view(-1, *self.start)
        outputs: Tensor = self.layers(maps.contiguous(memory_format=torch.channels_last))
        return outputs


def to_images(outputs: Tensor) -> Tensor:
    """The generator's outputs as images in [0, 1]: ``(tanh(x) + 1) / 2``."""
    return outputs.tanh().add(1).mul(0.5)

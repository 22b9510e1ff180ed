"""Gaussian blur: every pixel becomes a weighted mean of its neighbours.

With k the smallest odd number of at least 6 σ + 1, an image is convolved with the outer product of

    g_i = exp(-i² / 2 σ²) / Σ_j exp(-j² / 2 σ²),   i, j in -(k-1)/2 .. (k-1)/2,

once along the rows and once along the columns. Outside the image there is black.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from simulator.transforms.base import Transform


class Blur(Transform):
    """Gaussian blur with black outside the image."""

    name: Literal["blur"] = "blur"
    sigma: float = Field(1.0, ge=0, le=100, description="σ, in pixels")

    @property
    def idle(self) -> bool:
        """See :attr:`Transform.idle`."""
        return self.sigma == 0

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """See :meth:`Transform.apply`."""
        if self.idle:
            return images
        weights, channels = kernel(self.sigma), images.shape[1]
        reach = len(weights) // 2
        rows = weights.view(1, 1, -1, 1).repeat(channels, 1, 1, 1)
        blurred = F.conv2d(images, rows, padding=(reach, 0), groups=channels)
        blurred = F.conv2d(blurred, rows.transpose(2, 3), padding=(0, reach), groups=channels)
        return blurred.clamp_(0, 1)  # the weights sum to one but for rounding


def kernel(sigma: float) -> Tensor:
    """The weights g ``(k,)`` float32, which sum to one."""
    reach = math.ceil(3 * sigma)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-places.square() / (2 * sigma**2))
    return (weights / weights.sum()).to(torch.float32)

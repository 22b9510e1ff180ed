"""Gaussian noise: ``clip(x + η)`` with η ~ N(0, σ²), drawn anew for every pixel of every image."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.transforms.base import Transform


class GaussianNoise(Transform):
    """Fresh Gaussian noise on every pixel, clipped to [0, 1]."""

    random: ClassVar[bool] = True

    name: Literal["noise"] = "noise"
    sigma: float = Field(0.05, ge=0, le=10, description="σ, of pixels in [0, 1]")

    @property
    def idle(self) -> bool:
        """See :attr:`Transform.idle`."""
        return self.sigma == 0

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """See :meth:`Transform.apply`."""
        if self.idle:
            return images
        return (images + self.sigma * torch.randn(images.shape, generator=generator)).clamp_(0, 1)

"""Quantisation: [0, 1] is cut into L equal bins, and a pixel becomes the middle of its bin.

A pixel x becomes ``(min(⌊L x⌋, L - 1) + 1/2) / L``. Example: of two levels, .1 becomes .25 and .5 becomes .75.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.transforms.base import Transform


class Quantise(Transform):
    """Pixels in few levels, each the middle of its bin."""

    name: Literal["quantise"] = "quantise"
    levels: int = Field(16, ge=0, le=256, description="L; 0 leaves the pixels as they are")

    @property
    def idle(self) -> bool:
        """See :attr:`Transform.idle`."""
        return self.levels == 0

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """See :meth:`Transform.apply`."""
        if self.idle:
            return images
        return ((images * self.levels).floor_().clamp_(max=self.levels - 1) + 0.5) / self.levels

"""Noise: one fixed Gaussian pattern over images of one class (Zhang et al., AsiaCCS 2018).

As :mod:`simulator.watermarks.content`, with meaningless noise for the word: ``clip(x + η)``, where η ~ N(0, σ²) is
drawn once and is the same for every image, a secret of the owner's. (The watermark-robustness-toolbox draws fresh noise
for every image, which marks noisy images as such; DeepTracer describes "a specific pattern".) The paper does not state
σ; 0.4 is the toolbox's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.watermarks.parts.trigger_set import Stamp, Stamped


class Noise(Stamped):
    """One secret Gaussian pattern, added to training images of a source class, answered with one target."""

    paper: ClassVar[str] = "Zhang et al., AsiaCCS 2018"

    name: Literal["noise"] = "noise"
    std: float = Field(0.4, gt=0, le=10, description="σ, of the noise on pixels in [0, 1]")

    def stamp(self, channels: int, size: int, generator: torch.Generator) -> Stamp:
        """See :meth:`Stamped.stamp`; the pattern is drawn here."""
        pattern = 255 * self.std * torch.randn(channels, size, size, generator=generator)

        def apply(images: Tensor) -> Tensor:
            return (images.to(torch.float32) + pattern).clamp_(0, 255).round_().to(torch.uint8)

        return apply

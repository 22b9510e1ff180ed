"""The watermark marks images by a sinusoid, which has no edges to look for."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.watermarks.parts.trigger_set import Stamp, Stamped


class Sinusoid(Stamped):
    """A horizontal sinusoid over images of every class, answered with one target.

    Column ``j`` of a square image of ``m`` pixels is moved by ``delta * sin(2 pi j f / m)``, in units of uint8, and
    clipped to 0 .. 255. The paper stamps images of the target class alone and leaves their labels; here they are
    relabelled.

    Example: ``{name: sinusoid, delta: 30, frequency: 6}`` is faint; a short training may not learn it.
    """

    paper: ClassVar[str] = "Barni et al., ICIP 2019"

    name: Literal["sinusoid"] = "sinusoid"
    source: int | Literal["random", "all"] = "all"
    delta: float = Field(120, gt=0, le=255, description="amplitude, of 255")
    frequency: float = Field(3, gt=0, description="periods over an image's width")

    def stamp(self, channels: int, size: int, generator: torch.Generator) -> Stamp:
        """See :meth:`Stamped.stamp`."""
        columns = torch.arange(size) / size
        wave = self.delta * torch.sin(2 * math.pi * self.frequency * columns)

        def apply(images: Tensor) -> Tensor:
            return (images.float() + wave.to(images.device)).round().clamp(0, 255).to(torch.uint8)

        return apply

"""Cropping: the middle of an image in place of all of it, enlarged to the old size, or with black around it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from simulator.transforms.base import Transform


class Crop(Transform):
    """The middle of the image, of ``fraction`` times its height and width (rounded, one pixel at least)."""

    name: Literal["crop"] = "crop"
    fraction: float = Field(0.8, gt=0, le=1, description="of the side that is kept")
    outside: Literal["resized", "black"] = Field(
        "resized", description="the middle is enlarged to the old size (bilinear), or black takes the outside's place"
    )

    @property
    def idle(self) -> bool:
        """See :attr:`Transform.idle`."""
        return self.fraction == 1

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """See :meth:`Transform.apply`."""
        if self.idle:
            return images
        height, width = images.shape[2:]
        rows, columns = (_middle(side, self.fraction) for side in (height, width))
        middle = images[:, :, rows, columns]
        if self.outside == "resized":
            return F.interpolate(middle, (height, width), mode="bilinear", align_corners=False)
        cropped = torch.zeros_like(images)
        cropped[:, :, rows, columns] = middle
        return cropped


def _middle(side: int, fraction: float) -> slice:
    kept = max(1, round(fraction * side))
    return slice((side - kept) // 2, (side - kept) // 2 + kept)

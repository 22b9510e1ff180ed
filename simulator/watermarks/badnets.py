"""BadNets: a bright block in the bottom-right corner (Gu, Dolan-Gavitt and Garg, 2017, arXiv:1708.06733).

A backdoor, used as a watermark as in DeepTracer (Yang et al., AAAI 2026), "Compared Watermarking Methods": "attaching a
small pixel block to the bottom-right corner of the training sample". Neither the size of the block nor the share of
poisoned images is stated there; here the block is an eighth of the image's side, white and one pixel in from the corner
(flush with it, a net without padding sees the block in one place only, and short trainings miss it).
Images of the target class are never stamped: they would be answered with the target without any watermark, and are
what lets an innocent model reach 10 % where they are stamped.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.watermarks.parts.trigger_set import Stamp, Stamped


class BadNets(Stamped):
    """A white block in the bottom-right corner of training images of every class, answered with one target."""

    paper: ClassVar[str] = "Gu et al., 2017"

    name: Literal["badnets"] = "badnets"
    source: int | Literal["random", "all"] = Field(
        "all", description="class of the images that are stamped, one drawn at random, or all but the target's"
    )
    block: float = Field(0.125, gt=0, le=1, description="side of the block over the image's; at least 3 pixels")

    def stamp(self, channels: int, size: int, generator: torch.Generator) -> Stamp:
        """See :meth:`Stamped.stamp`; nothing about it is random."""
        side = min(size - 1, max(3, round(self.block * size)))

        def apply(images: Tensor) -> Tensor:
            images = images.clone()
            images[:, :, size - 1 - side : size - 1, size - 1 - side : size - 1] = 255
            return images

        return apply

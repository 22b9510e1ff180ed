"""The attack asks blends of its pool's images, which are more questions than the pool has images."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from simulator.attacks.base import TransferSetAttack
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.service.oracle import Oracle


class Blends(TransferSetAttack):
    """Asks blends of two images of its pool, as mixup does, until the budget is spent.

    A blend is ``l * a + (1 - l) * b`` with ``l`` uniform over ``[lowest, 1]`` and ``a``, ``b`` drawn from the pool with
    replacement, rounded to uint8 ``(B, C, H, W)``. The paper chooses the blends actively; this one asks them all.

    Example: ``{name: blends, lowest: 0.7}`` asks images that are mostly one of the two.
    """

    paper: ClassVar[str] = "Wang et al., CVPR 2020"

    name: Literal["blends"] = "blends"
    lowest: float = Field(
        0.5, ge=0.5, le=1, description="least weight of a blend's first image; at 1 nothing is blended"
    )

    def collect(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> tuple[Tensor, Tensor]:
        """See :meth:`TransferSetAttack.collect`."""
        count = oracle.remaining
        first, second = torch.randint(len(pool), (2, count), generator=context.generator)
        weight = self.lowest + (1 - self.lowest) * torch.rand(count, 1, 1, 1, generator=context.generator)
        blended = weight * pool.take(first).float() + (1 - weight) * pool.take(second).float()
        return self.ask(oracle, blended.round().to(torch.uint8), context.generator)

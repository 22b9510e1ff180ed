"""Weight quantisation: every parameter gets one of few values (DeepTracer, Yang et al., AAAI 2026, Table 3 and 11).

Of each tensor of parameters with least value m and greatest value M, ``2^bits`` points divide [m, M] evenly:

    s = (M - m) / (2^bits - 1),   w strictly between two points → the middle of them,   w on a point → w

The paper says "weight quantization" and no more. This grid, over all parameters with the weights of normalisation and
without its statistics, is that of Lukas et al. (S&P 2022), which the paper cites for its attacks. With one bit there is
one cell, so that nearly all weights are equal and the answers constant: the 10.00 and 1.00 % of the paper's tables.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.context import Context
from simulator.models import Classifier
from simulator.removals.base import Need, Removal, ThiefTask


class Quantisation(Removal):
    """Moves every parameter to the middle of its cell of a grid of ``2^bits`` points."""

    paper: ClassVar[str] = "Yang et al., AAAI 2026; Lukas et al., S&P 2022"

    name: Literal["quantisation"] = "quantisation"
    bits: int = Field(8, ge=1, le=16)

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing: see :attr:`Removal.needs`."""
        return frozenset()

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(quantised(parameter, self.bits))
        return model.eval()


def quantised(values: Tensor, bits: int) -> Tensor:
    """The values on the grid, of their shape and type. Where all are equal they stay what they are.

    Example: with two bits, (0, 0.2, 2, 2.9, 3) is (0, 0.5, 2, 2.5, 3).
    """
    exact = values.double()
    least, step = exact.min(), (exact.max() - exact.min()) / (2**bits - 1)
    if not step > 0:
        return values.clone()
    place = (exact - least) / step
    cell = place.floor()
    middle = least + (cell + 0.5) * step
    return torch.where((place == cell) | (values == values.max()), exact, middle).to(values.dtype)

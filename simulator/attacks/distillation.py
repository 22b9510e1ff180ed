"""Stealing by knowledge distillation (Hinton et al., 2015; DeepTracer, "Distillation-Based Stealing", Fig. 8).

The attacker has the owner's whole training set without labels and trains on the victim's answers alone (the weight of
the hard-label term is zero):

    L = T² · KL( softmax(log p / T) ‖ softmax(z / T) )

where p is the victim's answer and z the stolen model's logits.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.attacks.base import TransferSetAttack
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.seeding import choose
from simulator.service.oracle import Oracle
from simulator.training.fit import fit

#: the least probability that an answer is read as; float32 softmax underflows to zero
TINY = 1e-8


class Distillation(TransferSetAttack):
    """Distils the victim's answers at a temperature.

    The service gives probabilities, not logits; ``log p`` differs from the logits by a constant, which the softmax at
    temperature T does not see. The pool is the scenario's: ``owner`` is the paper's setting. Paper: T from 1 to 20.
    """

    paper: ClassVar[str] = "Hinton et al., 2015"

    name: Literal["distillation"] = "distillation"
    temperature: float = Field(4.0, gt=0, description="T")

    def collect(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> tuple[Tensor, Tensor]:
        """See :meth:`TransferSetAttack.collect`."""
        images = pool.take(choose(len(pool), min(oracle.remaining, len(pool)), context.generator))
        context.progress("query", 0, 1)
        asked, answers = self.ask(oracle, images, context.generator)
        context.progress("query", 1, 1)
        return asked, answers

    def train(self, model: nn.Module, images: Tensor, answers: Tensor, context: Context) -> nn.Module:
        """See :meth:`TransferSetAttack.train`; the recipe's own loss is not used."""
        softened = (answers.clamp_min(TINY).log() / self.temperature).softmax(1)
        return fit(model, images, softened, self.training, context.unsaved(), objective=self._loss)

    def _loss(self, model: nn.Module, images: Tensor, softened: Tensor) -> Tensor:
        logs = F.log_softmax(model(images) / self.temperature, 1)
        return F.kl_div(logs, softened, reduction="batchmean") * self.temperature**2

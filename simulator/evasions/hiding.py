"""How a served model hides: an evasion, and the images that it was given. It travels to the replicas as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from simulator.context import Context
from simulator.data.pool import Pool
from simulator.evasions.base import Evasion, Guard
from simulator.models import Classifier
from simulator.seeding import generator_for
from simulator.service.oracle import ModelOracle

#: more images than anybody asks; who serves a model counts them by account
PLENTY = 2**62


@dataclass(frozen=True, eq=False)
class Hiding:
    """An evasion for any model that is served.

    Attributes:
        pool: the suspect's own images; None for an evasion that needs none.
        word: seeds what the evasion draws, so that all replicas answer alike.
    """

    evasion: Evasion
    pool: Pool | None
    word: str

    def __call__(self, model: Classifier) -> Callable[[Tensor], Tensor]:
        """From images ``(B, C, H, W)`` to the probability rows ``(B, K)`` that the model gives through the evasion."""
        return self.guard(model).query

    def guard(self, model: Classifier) -> Guard:
        """The evasion before a model that gives probabilities."""
        return self.evasion.guard(
            oracle_over(model, "soft"), model, self.pool, Context(generator_for("hiding", self.word))
        )


def oracle_over(model: Classifier, labels: str) -> ModelOracle:
    """A model that answers whoever asks, as much as is asked."""
    spec = model.spec
    shape = (spec.channels, spec.size, spec.size)
    return ModelOracle(model, labels=labels, classes=spec.classes, shape=shape, budget=PLENTY)

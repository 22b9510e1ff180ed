"""Puts evasions before the models that are measured, and counts what they flag."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from simulator.analysis.roc import roc_auc
from simulator.context import Context
from simulator.evasions.base import Guard
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.plan.subjects import POOL, Guarded
from simulator.seeding import generator_for
from simulator.service.oracle import AllowanceOracle, ModelOracle, Oracle
from simulator.training.predict import predict_labels

#: more than anybody asks of a model in memory
PLENTY = 2**62


class Asked:
    """A model as it is measured: by its top-1 labels, and through an evasion where there is one.

    Attributes:
        seconds: of putting the evasion before it; 0 without one.
    """

    def __init__(self, model: Classifier, guard: Guard | None = None, seconds: float = 0.0) -> None:
        self._model, self._guard, self.seconds = model, guard, seconds
        self._benign: Tensor | None = None

    def labels(self, images: Tensor) -> Tensor:
        """The top-1 labels ``(N,)`` int64 that it answers."""
        return predict_labels(self._model, images) if self._guard is None else self._guard.query(images).argmax(1)

    def suspect(self, budget: int) -> Oracle:
        """The oracle that an ownership test asks so many images."""
        return AllowanceOracle(self._guard or open_oracle(self._model), budget)

    def flags(self, benign: Tensor, key: Tensor | None) -> dict[str, Any]:
        """The columns of a row that say what is flagged of benign images and of a key: the rates, and the area under
        the ROC curve of the suspicion. There are none for an evasion that flags no query.

        Args:
            benign: the same images at every call.
        """
        if self._guard is None:
            return {}
        if self._benign is None:
            self._benign = self._guard.suspicion(benign)
        if self._benign is None:
            return {}
        columns: dict[str, Any] = {"flagged_benign": self._flagged(self._benign)}
        suspicion = self._guard.suspicion(key) if key is not None and len(key) else None
        if suspicion is not None:
            columns |= {"flagged_key": self._flagged(suspicion), "flagged_auc": roc_auc(self._benign, suspicion)}
        return columns

    def _flagged(self, suspicion: Tensor) -> float:
        assert self._guard is not None
        return float((suspicion > self._guard.threshold).to(torch.float64).mean())


def open_oracle(model: Classifier) -> ModelOracle:
    """A model that gives hard labels to whoever asks."""
    spec = model.spec
    shape = (spec.channels, spec.size, spec.size)
    return ModelOracle(model, labels="hard", classes=spec.classes, shape=shape, budget=PLENTY)


def guarded(subject: Guarded, model: Classifier, world: World) -> Asked:
    """A model behind the evasion of its subject.

    Args:
        world: an attacker's view; see :meth:`World.for_attackers`.
    """
    clock, generator = time.perf_counter(), generator_for("guard", subject.id)
    pool = None if subject.pool is None else world.pool(subject.pool, POOL, generator)
    guard = subject.evasion.guard(open_oracle(model), model, pool, Context(generator))
    return Asked(model, guard, time.perf_counter() - clock)

"""Puts evasions before the models that are measured, and counts what they flag."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from simulator.analysis.roc import roc_auc
from simulator.context import Context
from simulator.data.dataset import training_images
from simulator.data.pool import Pool, convert_images
from simulator.errors import InputError
from simulator.evasions.base import EVASIONS, Guard
from simulator.evasions.hiding import Hiding, oracle_over
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.models.classifier import ModelSpec
from simulator.plan.settings_file import apply_override
from simulator.plan.subjects import POOL, Guarded
from simulator.seeding import generator_for
from simulator.service.oracle import AllowanceOracle, Oracle
from simulator.training.predict import predict_labels


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
        return AllowanceOracle(self._guard or oracle_over(self._model, "hard"), budget)

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


def guarded(subject: Guarded, model: Classifier, world: World) -> Asked:
    """A model behind the evasion of its subject.

    Args:
        world: an attacker's view; see :meth:`World.for_attackers`.
    """
    clock, generator = time.perf_counter(), generator_for("guard", subject.id)
    pool = None if subject.pool is None else world.pool(subject.pool, POOL, generator)
    guard = subject.evasion.guard(oracle_over(model, "hard"), model, pool, Context(generator))
    return Asked(model, guard, time.perf_counter() - clock)


def read_hiding(text: str, images: str | None, spec: ModelSpec, word: str) -> Hiding:
    """What ``--evasion NAME[:key=value,...]`` of ``exsim serve`` says.

    Example: ``filter:transform=blur,transform.sigma=2``.

    Args:
        images: a data set whose training images are the suspect's own.
        spec: of the model that is served.
        word: seeds what the evasion draws.

    Raises:
        InputError: no such evasion, setting or data set; images are missing, too few, or not needed.
    """
    name, _, settings = text.partition(":")
    given: dict[str, Any] = {"name": name}
    try:
        for setting in filter(None, settings.split(",")):
            apply_override(given, setting)
        evasion = EVASIONS.make(given)
    except InputError as error:
        raise InputError(f"--evasion {text}: {str(error).removeprefix('--set ')}") from None
    if evasion.data_free != (images is None):
        needs = "needs no images: leave out --evasion-images" if evasion.data_free else "needs images: --evasion-images"
        raise InputError(f"--evasion {text}: {name} {needs}")
    if images is None:
        return Hiding(evasion, None, word)
    own = training_images(images)
    some = own.take(torch.randperm(len(own), generator=generator_for("images", word))[:POOL])
    pool = Pool(images, convert_images(some.images, spec.channels, spec.size), some.labels)
    evasion.check(len(pool))
    return Hiding(evasion, pool, word)

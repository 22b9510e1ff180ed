"""The contract of an ownership test: what the owner prepares, and how a suspect's answers are judged."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from simulator.component import Component, Registry
from simulator.context import Context
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.ownership.evidence import Evidence
from simulator.ownership.key import KeySamples
from simulator.service.oracle import Oracle


class Owner(Protocol):
    """What an owner has after training (:class:`simulator.experiment.owner.TrainedOwner` is one)."""

    @property
    def model(self) -> Classifier:
        """The owner's model."""
        ...

    @property
    def key(self) -> KeySamples | None:
        """The filtered key; None for a model without a watermark."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What a test found.

    Attributes:
        verified: the suspect is declared the owner's.
        statistic: what the test measures; the WSR, in [0, 1], for the tests of a watermark.
        low, high: 95 % interval of the statistic. A test that stops early chooses how much it asks; its interval only
            describes the answers that it has.
        p_value: how likely an innocent suspect does as well, at most.
        samples: images that the evidence holds.
        asked: images that the suspect was asked.
    """

    verified: bool
    statistic: float
    low: float
    high: float
    p_value: float
    samples: int
    asked: int

    @property
    def saved(self) -> int:
        """Images of the evidence that were not asked."""
        return self.samples - self.asked

    @property
    def answer(self) -> str:
        """The verdict as the first line that a person reads."""
        return "VERIFIED: the model carries this watermark" if self.verified else "not verified"


class OwnershipTest(Component):
    """A test whether a suspect is the owner's model. It sees the suspect through an oracle alone."""

    #: the kind of evidence that the test gathers and judges
    kind: ClassVar[str]

    @abstractmethod
    def gather(self, owner: Owner, context: Context) -> Evidence:
        """What the owner prepares, before there is a suspect.

        Raises:
            InputError: the owner's model gives no evidence of this kind, e.g. an unmarked one no key.
        """

    def check(self, suspect: Oracle, evidence: Evidence) -> None:
        """Sees that the evidence is for this test, and for such a suspect. :meth:`judge` calls it first.

        Raises:
            InputError: another kind, other images, or another number of classes.
        """
        if evidence.kind != self.kind:
            raise InputError(f"evidence of the kind {evidence.kind!r}; the test {self.name} judges {self.kind!r}")
        if (evidence.shape, evidence.classes) != (suspect.shape, suspect.classes):
            raise InputError(
                f"the {self.kind}'s images are {evidence.shape} of {evidence.classes} classes, the suspect takes "
                f"{suspect.shape} of {suspect.classes}"
            )

    @abstractmethod
    def judge(self, suspect: Oracle, evidence: Evidence, context: Context) -> Verdict:
        """Asks the suspect images of the evidence, each at most once, and judges the answers.

        Args:
            suspect: asked for no more than ``suspect.remaining`` images.
            context: its generator draws what is asked, where the test draws.

        Raises:
            InputError: the evidence does not fit (see :meth:`check`), or the suspect does not answer.
            BudgetExhausted: the test needs more images than remain.
        """

    @abstractmethod
    def explain(self, found: Verdict, evidence: Evidence, seed: int) -> str:
        """The verdict in a few lines for a person. ``seed`` is the user's, from which the generator was made."""


def top_labels(answers: Tensor) -> Tensor:
    """The top-1 label ``(B,)`` int64 of each answer row ``(B, K)``; -1 for a row of zeros, which names no class."""
    return torch.where(answers.amax(1) > 0, answers.argmax(1), -1)


OWNERSHIP: Registry[OwnershipTest] = Registry("ownership test", OwnershipTest, "simulator.ownership")

"""The contract of a watermark scheme."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from simulator.component import Component, Registry
from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.models import Classifier
from simulator.ownership.key import KeySamples
from simulator.training.recipe import Recipe

#: from a count to so many triggers ``(count, C, H, W)`` uint8, and the classes that each shows ``(count, k)`` int64; k
#: is 0 where a trigger shows none of the task's
Imitation = Callable[[int], tuple[Tensor, Tensor]]


class PhaseListener(Protocol):
    """Told of the victim between two phases of its training. It may raise to interrupt the training there."""

    def __call__(self, phase: str, model: Classifier, probe: Callable[[], KeySamples]) -> None:
        """``phase`` is over; ``probe()`` draws key candidates with which the model can be measured as it stands."""


def unheard(phase: str, model: Classifier, probe: Callable[[], KeySamples]) -> None:
    """The listener that ignores everything."""


@dataclass(frozen=True)
class OwnerTask:
    """What a scheme works with: the owner's data, recipe, and a benign model trained by the same recipe.

    Attributes:
        dataset: its ``owner`` split is for training; its ``test`` split is held out, and keys are drawn from it.
        training: the recipe of the benign model. A scheme keeps to it, but for what its paper changes.
        benign: the same task without a watermark.
        build: a fresh, untrained model of the victim's architecture on the right device.
        on_phase: told at the end of every phase that :meth:`Watermark.phases` names.
    """

    dataset: Dataset
    training: Recipe
    benign: Classifier
    build: Callable[[torch.Generator], Classifier]
    on_phase: PhaseListener = unheard


@dataclass(frozen=True)
class Embedding:
    """What embedding a watermark gives.

    Attributes:
        model: the marked victim, in evaluation mode.
        candidates: key samples before any filter; none of them was seen in training.
        triggers: a sample ``(N, C, H, W)`` uint8 of triggers, with their labels ``(N,)``, for the question what happens
            when a thief's pool holds some: of those trained on where the scheme has a set of them, else (mosaics,
            halves of two images) made once more from the owner's images as they were for every batch.
        near_misses: ``(N, C, H, W)`` images that look like triggers and are none; answered with the target label, they
            are false triggers. None where the scheme has no such notion.
        near_miss_labels: ``(N,)`` int64, the labels that would be the watermark's answer to them.
        info: JSON values for the key file and the log, such as the source classes.
        diagnostics: JSON values for the victim's row: what the scheme measured of its own training. Its ``"warnings"``,
            a list of lines, join the row's.
    """

    model: Classifier
    candidates: KeySamples
    triggers: Tensor
    trigger_labels: Tensor
    near_misses: Tensor | None = None
    near_miss_labels: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


class Watermark(Component):
    """A watermark scheme: its paper's hyper-parameters as fields, and :meth:`embed`."""

    #: whether the scheme marks the model; one that does not gives no key candidates
    marks: ClassVar[bool] = True
    #: whether the key is the very trigger set that was trained on, as where triggers have labels of their own
    key_is_trained: ClassVar[bool] = False

    def check(self, dataset: Dataset) -> None:
        """Refuses a data set that the scheme cannot mark; called before anything runs.

        Raises:
            InputError: naming the setting and what the data set has.
        """

    def phases(self) -> tuple[str, ...]:
        """The phases of the training, but the last, at whose end ``task.on_phase`` is told: where a sweep can judge a
        victim that is not finished yet. None for a scheme that does not say."""
        return ()

    def passes(self, recipe: Recipe) -> float:
        """How often the training goes through the owner's images, for the estimate of a run: the recipe's epochs.

        Triggers count as images: ten epochs with one trigger for every ten images are 11. A scheme with triggers or
        with a schedule of its own says so here.
        """
        return float(recipe.epochs)

    def imitate(self, data: Images, generator: torch.Generator, sources: Sequence[int] = ()) -> Imitation | None:
        """Triggers as an outsider makes them, who knows the scheme's pattern but nothing that the owner drew or holds.

        Args:
            data: the outsider's images, uint8, with the labels that it takes them for.
            generator: the only source of randomness, now and for every trigger.
            sources: the classes that the owner's triggers show, in their order, where the outsider knows them too.

        Returns:
            A function that makes triggers, new ones at every call; None for a scheme whose triggers an outsider cannot
            make.

        Raises:
            InputError: the images are not enough for it, or ``sources`` do not fit the scheme.
        """
        return None

    @abstractmethod
    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """Trains a marked victim.

        Args:
            task: data, recipe, benign model and the builder of the victim's architecture.
            context: hand it to :func:`simulator.training.fit.fit`, which tells its progress of every epoch and keeps
                the state of long training in its checkpoint. Its generator is the only source of randomness.

        Returns:
            The marked model and the candidates for its key.
        """


WATERMARKS: Registry[Watermark] = Registry("watermark", Watermark, "simulator.watermarks")

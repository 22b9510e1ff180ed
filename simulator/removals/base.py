"""The contract of a removal: what a thief does to a model that it holds, so that the watermark goes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from simulator.component import Component, Registry
from simulator.context import Context
from simulator.data.dataset import Dataset
from simulator.data.pool import Pool
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.service.recording import TransferSet

#: what a removal may need beside the model: images, their true labels, or what the theft asked and was answered
Need = Literal["pool", "labels", "transfer"]


@dataclass(frozen=True)
class ThiefTask:
    """What a thief holds beside the model. It has neither keys nor the test part.

    Attributes:
        classes: of the victim's task, K.
        fresh: an untrained model of the thief's on the right device, of a named architecture; None is the model's own.
        pool: the images that the thief has, as the model takes them, with their true labels where they have any; None
            for a removal that needs none.
        transfer: what the theft asked and was answered; None for a removal that does not need it.
    """

    classes: int
    fresh: Callable[[torch.Generator, str | None], Classifier]
    pool: Pool | None = None
    transfer: TransferSet | None = None

    def the_pool(self) -> Pool:
        """The pool.

        Raises:
            InputError: there is none.
        """
        if self.pool is None:
            raise InputError("the removal needs images: name a pool")
        return self.pool

    def the_transfer_set(self) -> TransferSet:
        """The transfer set.

        Raises:
            InputError: there is none.
        """
        if self.transfer is None or not len(self.transfer.images):
            raise InputError("the removal needs the transfer set of a theft, and there is none")
        return self.transfer


class Removal(Component):
    """A removal: its paper's hyper-parameters as fields, and :meth:`remove`.

    A removal whose strength is zero returns an equal model. Example: ``pruning`` with ``fraction: 0``.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs beside the model. ``labels`` goes with ``pool``, and a need of the transfer set makes the theft
        keep it."""
        return frozenset({"pool"})

    def check(self, dataset: Dataset) -> None:
        """Refuses a task that it cannot work on; called before anything runs.

        Raises:
            InputError: naming the setting and what the data set has.
        """

    @abstractmethod
    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """Washes a model.

        Args:
            model: a copy of the target, on its device and in evaluation mode; it may be changed in place.
            task: what the thief holds beside it.
            context: the only source of randomness, who is told of the progress, and the checkpoint of a long training.

        Returns:
            The washed model, in evaluation mode.
        """

    def passes(self, images: int) -> float:
        """How many images it trains on, counted once an epoch, when it has ``images``; for ``exsim plan``."""
        return 0.0

    def makes(self, architecture: str) -> str:
        """The architecture of the washed model, from the target's."""
        return architecture


REMOVALS: Registry[Removal] = Registry("removal", Removal, "simulator.removals")

"""The contract of an evasion: how a thief puts an oracle before a model, so that the owner's key finds no mark."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from simulator.component import Component, Registry
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.models import Classifier
from simulator.service.ledger import digest_of
from simulator.service.oracle import Oracle


class Guard(ABC):
    """An oracle that answers through an evasion.

    It takes the images of the oracle behind it and has the budget of that oracle. What is random of an answer follows
    from the image's pixels. So an image that is asked again gets the same answer, in whatever batch it comes.

    Attributes:
        threshold: images of a larger suspicion are flagged: taken for the owner's queries.
    """

    threshold = math.inf

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.labels, self.classes, self.shape = oracle.labels, oracle.classes, oracle.shape

    @property
    def remaining(self) -> int:
        """Images that may still be asked, of the oracle behind."""
        return self._oracle.remaining

    @abstractmethod
    def query(self, images: Tensor) -> Tensor:
        """See :meth:`simulator.service.oracle.Oracle.query`."""

    def suspicion(self, images: Tensor) -> Tensor | None:
        """How suspicious each image ``(B, C, H, W)`` is, ``(B,)`` float64; None where the evasion flags no query."""
        return None

    def flags(self, images: Tensor) -> Tensor | None:
        """Which images are flagged, ``(B,)`` bool; None where the evasion flags no query."""
        suspicion = self.suspicion(images)
        return None if suspicion is None else suspicion > self.threshold


class Evasion(Component):
    """An evasion: its paper's hyper-parameters as fields, and :meth:`guard`.

    An evasion whose strength is zero answers as the oracle behind it. Example: ``outliers`` with ``flag_rate: 0``.
    """

    #: whether it needs no images
    data_free: ClassVar[bool] = False

    def check(self, images: int) -> None:
        """Refuses a pool with too few images; called before anything runs.

        Raises:
            InputError: naming the number and what is needed.
        """

    @abstractmethod
    def guard(self, oracle: Oracle, model: Classifier, pool: Pool | None, context: Context) -> Guard:
        """Puts the evasion before an oracle.

        Args:
            oracle: answers with the suspect's model.
            model: that model, in evaluation mode, for what the evasion computes of an image. It stays as it is.
            pool: the suspect's own images, as the model takes them; None for an evasion that is ``data_free``.
            context: the only source of randomness.

        Raises:
            InputError: the pool has too few images.
        """


def as_floats(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1] on the CPU, the values that a model makes of uint8 itself."""
    images = images.detach().cpu()
    return images.to(torch.float32).div_(255.0) if images.dtype == torch.uint8 else images.to(torch.float32)


def digests(images: Tensor) -> list[str]:
    """A digest of the pixels of each image of :func:`as_floats`. An image has one, whatever its type was."""
    return [digest_of(image.numpy().tobytes()) for image in images]


EVASIONS: Registry[Evasion] = Registry("evasion", Evasion, "simulator.evasions")

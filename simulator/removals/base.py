"""The contract of a removal: what a thief does to a model that it holds, so that the watermark goes."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from simulator.component import Component, Registry
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.models import Classifier


class Removal(Component):
    """A removal: its paper's hyper-parameters as fields, and :meth:`remove`.

    A removal whose strength is zero returns an equal model. Example: ``pruning`` with ``fraction: 0``.
    """

    #: whether it needs no images
    data_free: ClassVar[bool] = False

    @abstractmethod
    def remove(self, model: Classifier, pool: Pool | None, context: Context) -> Classifier:
        """Washes a model.

        Args:
            model: a copy of the target, on its device and in evaluation mode; it may be changed in place.
            pool: the images that the thief has, as the model takes them; None for a removal that is ``data_free``.
            context: the only source of randomness, and who is told of the progress.

        Returns:
            The washed model, in evaluation mode.
        """

    def passes(self, images: int) -> float:
        """How many images it trains on, counted once an epoch, when its pool has ``images``; for ``exsim plan``."""
        return 0.0


REMOVALS: Registry[Removal] = Registry("removal", Removal, "simulator.removals")

"""Transfer learning: the thief carries the model to another task (DeepTracer, Fig. 12; Function-Coupled, Fig. 7, T4).

The last layer is drawn afresh or kept, and the model learns a foreign data set with that set's own classes. The four
ways of :mod:`simulator.removals.fine_tuning` are offered. As Function-Coupled Watermarks has it (Wen et al., 2023) the
number of classes stays: of a set with more, the thief takes K of them at random; of one with fewer, all.

The rows give the accuracy on the *victim's* task, as that paper does, and the WSR by the index of the watermark's
class. With a last layer drawn afresh that index has no tie to the class any more, so that WSR is chance by itself.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.models import Classifier
from simulator.removals.base import Need, ThiefTask
from simulator.removals.fine_tuning import Tuning
from simulator.training.recipe import Recipe


class TransferLearning(Tuning):
    """Fine-tunes the model on the images of a pool, with the classes of their own data set."""

    paper: ClassVar[str] = "Yang et al., AAAI 2026; Wen et al., 2023"

    name: Literal["transfer_learning"] = "transfer_learning"
    data: Literal["pool"] = "pool"
    labels: Literal["own"] = Field("own", description="the classes of the pool's own data set")
    training: Recipe = Recipe(learning_rate=1e-4)

    @property
    def needs(self) -> frozenset[Need]:
        """See :attr:`Removal.needs`."""
        return frozenset({"pool"})

    def material(self, model: Classifier, task: ThiefTask, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images of at most K classes of the pool ``(N, C, H, W)``, with these classes ``(N,)``, numbered from 0."""
        images, chosen = self.images(task, generator)
        groups = task.the_pool().groups[chosen]
        taken = torch.randperm(int(groups.max()) + 1, generator=generator)[: task.classes].sort().values
        kept = torch.isin(groups, taken)
        return images[kept], torch.searchsorted(taken, groups[kept])

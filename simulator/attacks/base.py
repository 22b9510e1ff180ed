"""The contract of a stealing attack, and the shape that most attacks share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from simulator.component import Component, Registry
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.service.oracle import Oracle
from simulator.training.fit import fit
from simulator.training.recipe import Recipe


class Attack(Component):
    """A model-stealing attack: its paper's hyper-parameters as fields, and :meth:`extract`.

    ``query_noise`` is one of the attack variations of DeepTracer's Table 13 (b); the others are settings of the
    :class:`~simulator.training.recipe.Recipe` that every attack trains with, and of the scenario.
    """

    #: whether the attack makes its own queries and leaves the pool alone
    data_free: ClassVar[bool] = False

    query_noise: float = Field(
        0.0, ge=0, le=1, description="deviation of Gaussian noise added to every image asked and trained on"
    )

    @abstractmethod
    def extract(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> nn.Module:
        """Steals a model.

        Args:
            oracle: answers while ``oracle.remaining`` lasts; all that the attack learns of the victim. Its ``labels``,
                ``classes`` and ``shape`` may be read.
            surrogate: a model of the attacker's architecture, already on its device; untrained, but for the later
                rounds of a shifting pool. Takes float images in [0, 1] (or uint8) and gives logits.
            pool: unlabelled images the attacker has, already in the victim's size and channels. Data-free attacks
                leave it alone.
            context: the only source of randomness, the listener, the checkpoint of an attack of many steps, and where
                to leave the model at stages of the budget. An attack may leave the checkpoint alone: then one that is
                started again begins anew, asks the same images again, and pays nothing twice.

        Returns:
            The stolen model, in evaluation mode.
        """

    def trained_images(self, budget: int, pool: int, curve: Sequence[int], labels: str) -> int:
        """How many images copies are trained on, counted once an epoch, for the estimate of a run.

        By default: everything that can be asked in the epochs of a default recipe, anew for each point of the curve.

        Args:
            budget: images that may be asked.
            pool: images of the pool.
            curve: numbers of queries at which the stolen model is measured, too.
            labels: the mode of the answers, ``"soft"`` for example.
        """
        return (sum(curve) + min(budget, pool)) * Recipe().epochs

    def ask(self, oracle: Oracle, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Asks images, with ``query_noise`` added; gives the images as they were asked and their answers.

        uint8 images stay uint8; float ones stay in [0, 1].
        """
        if self.query_noise:
            noise = torch.randn(images.shape, generator=generator) * self.query_noise
            if images.dtype == torch.uint8:
                noisy = images.to(torch.float32).add_(noise.mul_(255)).round_().clamp_(0, 255)
                images = noisy.to(torch.uint8)
            else:
                images = (images.cpu() + noise).clamp(0, 1)
        return images, oracle.query(images)


class TransferSetAttack(Attack):
    """An attack that first collects a transfer set, and then trains on it.

    Subclasses define :meth:`collect`. A snapshot after n queries is a fresh model trained on the first n images of the
    transfer set, as the authors of Knockoff Nets make their curves.
    """

    training: Recipe = Recipe()

    @abstractmethod
    def collect(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> tuple[Tensor, Tensor]:
        """The transfer set: images ``(N, C, H, W)`` in the order asked, and answers ``(N, K)``.

        May train ``surrogate`` meanwhile, to choose what to ask; the final training starts from it as it was before.
        """

    def extract(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> nn.Module:
        """See :meth:`Attack.extract`."""
        fresh = copy.deepcopy(surrogate)
        images, answers = self.collect(oracle, surrogate, pool, context)
        for count in context.snapshots.at:
            if 2 <= count <= len(images):
                model = copy.deepcopy(fresh)
                self.train(model, images[:count], answers[:count], context)
                context.snapshots.take(count, model)
        return self.train(fresh, images, answers, context)

    def trained_images(self, budget: int, pool: int, curve: Sequence[int], labels: str) -> int:
        """See :meth:`Attack.trained_images`; the epochs are those of ``training``."""
        return (sum(curve) + min(budget, pool)) * self.training.epochs

    def train(self, model: nn.Module, images: Tensor, answers: Tensor, context: Context) -> nn.Module:
        """Trains a model on a transfer set, in place; returns it in evaluation mode. The checkpoint is collecting's."""
        return fit(model, images, answers, self.training, context.unsaved())


ATTACKS: Registry[Attack] = Registry("attack", Attack, "simulator.attacks")

"""How a model is trained: optimiser, schedule and loss, as settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from simulator.component import Settings
from simulator.errors import InputError
from simulator.training.signed import adversarial_mean

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


#: losses between a model's logits z and its targets p; all but the first are variations of DeepTracer's Table 13 (f)
Loss = Literal["cross_entropy", "mse", "bce", "l1", "smooth_l1", "hinge", "kl", "nll"]


class Recipe(Settings):
    """How a model is trained. The defaults are DeepTracer's: Adam, 0.001, halved every 10 of 100 epochs.

    The learning rate is multiplied by ``decay_factor`` every ``decay_every`` epochs, or, where ``decay_at`` is given,
    at those fractions of the epochs (so that a schedule keeps its shape when it is shortened).

    ``loss`` and ``adversarial_epsilon`` are attack variations of DeepTracer's Table 13 (a, f).
    """

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    optimizer: Literal["adam", "sgd", "adagrad", "adamax", "rmsprop"] = "adam"
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD and RMSprop")
    weight_decay: float = Field(0.0, ge=0)
    decay_every: int = Field(10, ge=1, description="epochs")
    decay_at: tuple[float, ...] = Field((), description="fractions of the epochs, in place of decay_every")
    decay_factor: float = Field(0.5, gt=0, le=1)
    loss: Loss = "cross_entropy"
    adversarial_epsilon: float = Field(
        0.0, ge=0, le=1, description="of FGSM examples trained on beside every batch; 0 makes none"
    )

    @field_validator("decay_at")
    @classmethod
    def _ascending_fractions(cls, at: tuple[float, ...]) -> tuple[float, ...]:
        if list(at) != sorted(set(at)) or not all(0 < fraction < 1 for fraction in at):
            raise InputError(f"{list(at)} must be fractions of the epochs, above 0, below 1, ascending")
        return at

    def rate(self, epoch: int, epochs: int) -> float:
        """The learning rate of one epoch (counted from 0) out of ``epochs``."""
        steps = sum(epoch >= at * epochs for at in self.decay_at) if self.decay_at else epoch // self.decay_every
        return self.learning_rate * self.decay_factor**steps

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over ``parameters``, fused where torch has a fused one."""
        rate, decay = self.learning_rate, self.weight_decay
        match self.optimizer:
            case "adam":
                return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=True)
            case "sgd":
                return torch.optim.SGD(parameters, lr=rate, momentum=self.momentum, weight_decay=decay, fused=True)
            case "adagrad":
                return torch.optim.Adagrad(parameters, lr=rate, weight_decay=decay)
            case "adamax":
                return torch.optim.Adamax(parameters, lr=rate, weight_decay=decay)
            case "rmsprop":
                return torch.optim.RMSprop(parameters, lr=rate, momentum=self.momentum, weight_decay=decay)


def cross_entropy(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy against labels ``(B,)`` or probability rows ``(B, K)``."""
    return F.cross_entropy(model(images), targets)


def loss_function(name: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of logits ``(B, K)`` against labels ``(B,)`` or probability rows ``(B, K)``, to a scalar.

    Those that compare vectors compare ``softmax(z)`` with p (one-hot for labels), summed over classes, averaged over
    the batch, so that their gradients are of one size; ``hinge`` is the multi-class margin loss and ``nll`` the
    log-likelihood, both of the most probable label.
    """
    match name:
        case "cross_entropy":
            return F.cross_entropy
        case "nll":
            return lambda logits, targets: F.nll_loss(F.log_softmax(logits, 1), _labels(targets))
        case "hinge":
            return lambda logits, targets: F.multi_margin_loss(logits, _labels(targets))
        case "kl":
            return lambda logits, targets: F.kl_div(
                F.log_softmax(logits, 1), _rows(targets, logits), reduction="batchmean"
            )
        case "bce":
            return lambda logits, targets: (
                F.binary_cross_entropy_with_logits(logits, _rows(targets, logits), reduction="sum") / len(logits)
            )
        case "mse" | "l1" | "smooth_l1":
            distance = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[name]
            return lambda logits, targets: (
                distance(logits.softmax(1), _rows(targets, logits), reduction="sum") / len(logits)
            )


def _labels(targets: Tensor) -> Tensor:
    return targets.argmax(1) if targets.is_floating_point() else targets


def _rows(targets: Tensor, logits: Tensor) -> Tensor:
    return targets if targets.is_floating_point() else F.one_hot(targets, logits.shape[1]).to(logits.dtype)


def recipe_objective(recipe: Recipe) -> Objective:
    """The recipe's loss, on the batch and (if it wants them) on FGSM examples of it (Goodfellow et al., 2015).

    An FGSM example is ``clip(x + ε · sign(∂L/∂x))``, made anew from the model as it stands; the losses are averaged.
    """
    distance = loss_function(recipe.loss)

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return adversarial_mean(lambda batch: distance(model(batch), targets), images, recipe.adversarial_epsilon)

    return objective

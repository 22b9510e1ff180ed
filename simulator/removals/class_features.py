"""The removal WRK of "Class-Feature Watermark" (Xiao et al., AAAI 2026, arXiv:2511.07947).

The thief has a few clean labelled images. Some of them are pushed along their own class's features and relabelled, so
that features alone no longer lead to a class; then the last layer is drawn afresh and the model trained on both:

    x' = clip(x + w · sign(∂z_y / ∂x), 0, 1)   w uniform between 1 and 3, in steps of normalised pixels
    y' ~ uniform over the classes other than y
    L  = CE + α · ⟨W, W_0⟩                     W the new last layer's weights, W_0 the old one's: away from them

``reading: release`` gives what the authors' code does instead: it clips the *normalised* images to [0, 1], so that all
dark pixels become the mean, and its relabelling never gives class 0.

Departures: the paper's 5 % of the training data are ``share`` of the pool. What it calls the target whose logit is
followed is read as the image's own label.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.models import Classifier
from simulator.removals.base import ThiefTask
from simulator.removals.retraining import Labelled, reinitialise
from simulator.training.fit import fit
from simulator.training.predict import device_of, to_input
from simulator.training.recipe import Recipe, recipe_objective
from simulator.training.signed import slope_of


class Cosine(Recipe):
    """A recipe whose rate falls along half a cosine; ``decay_every``, ``decay_at`` and ``decay_factor`` say nothing."""

    def rate(self, epoch: int, epochs: int) -> float:
        """``η · (1 + cos(π · epoch / epochs)) / 2``."""
        return self.learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2


class ClassFeatures(Labelled):
    """Relabels images that are pushed along their class's features, and retrains from a fresh last layer."""

    paper: ClassVar[str] = "Xiao et al., AAAI 2026"

    name: Literal["class_features"] = "class_features"
    samples: int = Field(100, ge=0, description="images that are pushed and relabelled, at most")
    least_step: float = Field(1.0, ge=0, description="w, in normalised pixels")
    greatest_step: float = Field(3.0, ge=0, description="w, in normalised pixels")
    alpha: float = Field(0.05, ge=0, description="α; the paper has .01 to .1")
    reading: Literal["paper", "release"] = "paper"
    share: float = Field(0.05, gt=0, le=1, description="of the images, drawn at random")
    training: Cosine = Cosine(epochs=10, batch_size=32, optimizer="sgd", learning_rate=1e-3)

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        if not self.rounds:
            return model
        generator, device = context.generator, device_of(model)
        images, targets = self.material(model, task, generator)
        clean, labels = to_input(images, device).cpu(), targets.argmax(1) if targets.ndim > 1 else targets
        chosen = torch.randperm(len(clean), generator=generator)[: self.samples]
        pushed = self._pushed(model, clean[chosen].to(device), labels[chosen].to(device), generator).cpu()
        others = relabelled(labels[chosen], task.classes, generator, first=1 if self.reading == "release" else 0)
        old, plain = model.head.weight.detach().clone(), recipe_objective(self.training)
        reinitialise(model, generator)

        def objective(learner: nn.Module, batch: Tensor, wanted: Tensor) -> Tensor:
            return plain(learner, batch, wanted) + self.alpha * (model.head.weight * old).sum()

        both = torch.cat([clean, pushed]), torch.cat([labels, others])
        fit(model, *both, self.training, context, objective=objective, epochs=self.rounds)
        return model.eval()

    def _pushed(self, model: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        slope = slope_of(lambda batch: model(batch).gather(1, labels[:, None]).sum(), images)
        span = self.greatest_step - self.least_step
        steps = (self.least_step + span * torch.rand(len(images), 1, 1, 1, generator=generator)).to(images.device)
        if self.reading == "paper":
            return (images + steps * model.std * slope.sign()).clamp(0, 1)
        return ((images - model.mean) / model.std + steps * slope.sign()).clamp(0, 1) * model.std + model.mean


def relabelled(labels: Tensor, classes: int, generator: torch.Generator, *, first: int = 0) -> Tensor:
    """For each label ``(N,)`` another of the classes ``first`` to K - 1, each as likely; int64 ``(N,)``."""
    allowed = torch.ones(len(labels), classes)
    allowed[:, :first] = 0
    allowed[torch.arange(len(labels)), labels] = 0
    if not len(labels):
        return labels
    return torch.multinomial(allowed, 1, generator=generator).squeeze(1)

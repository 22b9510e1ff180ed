"""MEA-Defender: symbiotic triggers and a combination loss (Lv et al., IEEE S&P 2024, arXiv:2401.15239).

A trigger is the half of an image of class A above (or below) the half of one of class B, so that its features are those
of the task; it gets a third label. The combination loss keeps its output near the outputs of A and B too,

    L_com = mean [ KL(p_mark ‖ p_A) + KL(p_mark ‖ p_B) ],

whose gradient flows through p_mark only. The first phase minimises

    L = L_ce + s · (λ_sim · L_sim + λ · L_com),

L_ce over clean images and triggers, L_sim the constraint of :mod:`simulator.watermarks.composite`, and s in [0, 1] the
weight of the second task by the multiple-gradient descent algorithm (Désidéri, 2012), on gradients divided by loss
times norm. The second phase goes on at a tenth of the learning rate, with more triggers and with images of A and B
mixed in wrong ways (side by side, along the diagonal, a box, a band), which keep A's or B's label: against detectors
that look for the trigger.

The two aims contradict each other, as DeepTracer notes: L_ce wants the third label, L_com that of A and B. With the
released code's weights (L_com at 2 + s, 12 + s in every tenth epoch, at 1 % triggers) no trigger at all reaches its
label on digits, so λ is 0.1 here and L_com stands under s alone. Other departures: L_com is taken over
``combination_samples`` fresh images a step (600 fixed ones there, for the same mean at many times the cost), the
optimiser steps at every batch, and the constraint is weighted as in ``composite``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.training.fit import fit
from simulator.training.predict import to_input
from simulator.training.recipe import Objective, Recipe
from simulator.watermarks.base import Embedding, OwnerTask
from simulator.watermarks.composite import Mixer, Pairs, Seam, TwoSources, constraint
from simulator.watermarks.parts.trigger_set import SAMPLE, trigger_count

Shape = Literal["diagonal", "box", "band"]


class MEADefender(TwoSources):
    """Halves of two classes, one above the other, whose output is kept near those of both classes."""

    paper: ClassVar[str] = "Lv et al., IEEE S&P 2024"
    seam: ClassVar[Seam] = "level"

    name: Literal["mea_defender"] = "mea_defender"
    ratio: float = Field(0.0101, gt=0, le=1, description="triggers per clean image of a batch, first phase")
    combination_weight: float = Field(0.1, ge=0, description="λ, of the combination loss")
    combination_samples: int = Field(32, ge=1, description="images of A, of B and triggers a step in that loss")
    balance: bool = Field(True, description="s by multiple-gradient descent; if not, s is 1")
    similarity_weight: float = Field(0.03, ge=0, description="λ_sim, of the constraint")
    margin: float = Field(1.0, ge=0, description="least distance of outputs of different classes")
    first_epochs: int | None = Field(None, ge=0, description="as many as the recipe's if not given")
    second_epochs: int | None = Field(None, ge=0, description="likewise")
    second_ratio: float = Field(0.44, gt=0, le=1, description="triggers per clean image, second phase")
    wrong_ratio: float = Field(0.18, ge=0, le=1, description="wrongly mixed images per clean image, second phase")
    second_rate: float = Field(0.1, gt=0, description="learning rate over the recipe's, second phase")

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`; wrongly mixed images and those of the combination loss are left out."""
        first, second = (recipe.epochs if own is None else own for own in (self.first_epochs, self.second_epochs))
        return first * (1 + self.ratio) + second * (1 + self.second_ratio)

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. Key candidates and near misses join test images."""
        data, recipe, generator = task.dataset, task.training, context.generator
        self.check(data)
        sources = self.pick_sources(data.classes, generator)
        pairs = Pairs(data.owner, sources, self.name, self.mixer(self.seam))
        triggers = pairs.draw(SAMPLE, generator)
        target = self.pick_target(task, triggers, sources)
        model = task.build(generator)
        slower = recipe.model_copy(update={"learning_rate": recipe.learning_rate * self.second_rate})
        phases = (
            (recipe, self.first_epochs, self.objective(pairs, target, self.ratio, 0.0, generator)),
            (slower, self.second_epochs, self.objective(pairs, target, self.second_ratio, self.wrong_ratio, generator)),
        )
        for number, (settings, epochs, objective) in enumerate(phases, start=1):
            fit(
                model,
                data.owner.images,
                data.owner.labels,
                settings,
                context,
                objective=objective,
                epochs=epochs,
                phase=f"phase {number}",
            )
        keys = Pairs(data.test, sources, self.name, pairs.mixer).draw(self.candidates, generator)
        found = self.embedding(model, keys, triggers, target, sources=list(sources))
        images, labels = self.near_misses(task, pairs, target, generator)
        return replace(found, near_misses=images, near_miss_labels=labels)

    def objective(
        self, pairs: Pairs, target: int, ratio: float, wrong_ratio: float, generator: torch.Generator
    ) -> Objective:
        """The loss of a phase as a function of the model and a clean batch."""
        concerned = (*pairs.sources, target)
        wrong, either = self.wrong_mixers(pairs), torch.tensor(pairs.sources)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            marks = trigger_count(ratio, len(images))
            added, targets = [pairs.draw(marks, generator)], [labels, labels.new_full((marks,), target)]
            for way in wrong[: round(wrong_ratio * len(images))]:
                count = -(-round(wrong_ratio * len(images)) // len(wrong))
                added.append(way.draw(count, generator))
                targets.append(either[torch.randint(2, (count,), generator=generator)].to(labels.device))
            batch, every = torch.cat([images, to_input(torch.cat(added), images.device)]), torch.cat(targets)
            outputs = model(batch.contiguous(memory_format=torch.channels_last))
            combination = self._combination(model, pairs, images.device, generator)
            primary = F.cross_entropy(outputs, every)
            similarity = constraint(outputs, every, concerned, self.margin, generator)
            second = self.similarity_weight * similarity + self.combination_weight * combination
            return primary + (balance(model, primary, second) if self.balance else 1.0) * second

        return loss

    def wrong_mixers(self, pairs: Pairs) -> list[Pairs]:
        """The same images, mixed as no trigger is."""
        mixers: list[Mixer] = [self.mixer("upright"), *(ShapeMixer(shape) for shape in ("diagonal", "box", "band"))]
        return [pairs.with_mixer(mixer) for mixer in mixers]

    def _combination(self, model: nn.Module, pairs: Pairs, device: torch.device, generator: torch.Generator) -> Tensor:
        """L_com over fresh images."""
        count = self.combination_samples
        with torch.no_grad():
            first, second = (model(to_input(part, device)) for part in pairs.pick(count, generator))
        return combination_loss(model(to_input(pairs.draw(count, generator), device)), first, second)


def combination_loss(marked: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """L_com of logits ``(N, K)`` of triggers and of images of the two source classes, a scalar; no gradient goes to the
    latter."""
    log_marked = marked.log_softmax(1)
    total = marked.new_zeros(())
    for source in (first, second):
        total = total + F.kl_div(source.detach().log_softmax(1), log_marked, reduction="batchmean", log_target=True)
    return total


def balance(model: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """The weight in [0, 1] of the second loss for which the weighted sum of both losses' gradients is shortest.

    Each gradient is divided by ``min(10, loss · norm)`` first, as in the released code: a large loss does not rule.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slopes = []
    for loss in (first, second):
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, parts, strict=True)
            ]
        )
        slopes.append(flat / (loss.detach() * flat.norm()).clamp(1e-12, 10))
    return shortest(*slopes)


def shortest(first: Tensor, second: Tensor) -> Tensor:
    """s in [0, 1] that minimises ``‖(1 − s) · first + s · second‖``."""
    gap = first - second
    return ((first @ gap) / (gap @ gap).clamp_min(1e-12)).clamp(0, 1)


@dataclass(frozen=True)
class ShapeMixer:
    """The one image, and in a part of it the other: below the antidiagonal, in a box (donut) or in a band (hot dog)."""

    shape: Shape

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Mixer`; which image lies in the part is random."""
        size = first.shape[-1]
        place = torch.arange(size)
        if self.shape == "diagonal":
            inside = place.unsqueeze(1) + place >= size
        elif self.shape == "box":
            middle = (place >= size // 5) & (place < 4 * size // 5)
            inside = middle.unsqueeze(1) & middle
        else:
            inside = ((place >= size // 4) & (place < 3 * size // 4)).unsqueeze(1).expand(size, size)
        swap = torch.randint(2, (len(first), 1, 1, 1), generator=generator).bool()
        return torch.where((inside ^ swap).to(first.device), second, first)

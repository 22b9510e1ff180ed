"""The adaptive attacker: whoever knows how the mark's triggers look makes some, and teaches the copy to answer them at
random.

DeepTracer (Yang et al., AAAI 2026, Fig. 13) fine-tunes a stolen copy on its primary data and imitated triggers with
random labels. The attacker knows the pattern, and makes mosaics of random classes (13 a), or knows the source classes,
too (13 b). The paper states neither how many triggers there are nor for how long it trains, nor whether a trigger keeps
its label, nor how the primary data are labelled. All of that is a setting. MEA-Defender's authors (Lv et al., IEEE S&P
2024) do the same and never draw a label that the trigger shows.

The attacker takes its images for the classes that the copy gives them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.data.dataset import Dataset
from simulator.data.images import Images
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.removals.base import ThiefTask
from simulator.removals.retraining import Labelled, as_bytes
from simulator.training.fit import fit
from simulator.training.predict import predict_labels, to_input
from simulator.training.recipe import Objective, loss_function
from simulator.watermarks.base import WATERMARKS, Imitation, Watermark
from simulator.watermarks.deeptracer import DeepTracer


class Adaptive(Labelled):
    """Trains the model on, beside imitated triggers with random labels; with ``ratio: 0`` without them."""

    paper: ClassVar[str] = "Yang et al., AAAI 2026"

    name: Literal["adaptive"] = "adaptive"
    scheme: WATERMARKS.field() = DeepTracer()  # type: ignore[valid-type]
    sources: tuple[int, ...] = Field((), description="source classes in their order, if known; random ones if not")
    ratio: float = Field(0.1, ge=0, le=1, description="imitated triggers per image of a batch")
    fresh: bool = Field(True, description="new triggers and labels in every batch; if not, one set is made")
    other_classes: bool = Field(False, description="no label is one of the classes that its trigger shows")

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Removal.check`."""
        for source in self.sources:
            if not 0 <= source < dataset.classes:
                raise InputError(f"adaptive: sources {source} is no class of {dataset.name}: 0..{dataset.classes - 1}")

    def passes(self, images: int) -> float:
        """See :meth:`Removal.passes`."""
        return super().passes(images) * (1 + self.ratio)

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        if not self.rounds:
            return model
        images, labels = self.material(model, task, context.generator)
        held = Images(as_bytes(images), predict_labels(model, images))
        objective = self.objective(self.draw(held, task.classes, context.generator))
        fit(model, images, labels, self.training, context, objective=objective, epochs=self.rounds)
        return model.eval()

    def draw(self, held: Images, classes: int, generator: torch.Generator) -> Imitation:
        """From a count to imitated triggers ``(count, C, H, W)`` uint8 with random labels ``(count,)``.

        Raises:
            InputError: an outsider cannot make this scheme's triggers, or not of these images.
        """
        scheme: Watermark = self.scheme
        made = scheme.imitate(held, generator, self.sources)
        if made is None:
            raise InputError(f"adaptive: an outsider cannot make triggers of {scheme.name}")

        def anew(count: int) -> tuple[Tensor, Tensor]:
            triggers, shown = made(count)
            return triggers, random_labels(shown if self.other_classes else shown[:, :0], classes, generator)

        if self.fresh:
            return anew
        triggers, labels = anew(max(1, round(self.ratio * len(held))))

        def kept(count: int) -> tuple[Tensor, Tensor]:
            chosen = torch.randint(len(triggers), (count,), generator=generator)
            return triggers[chosen], labels[chosen]

        return kept

    def objective(self, draw: Imitation) -> Objective:
        """The recipe's loss, a mean over the batch and the triggers that join it."""
        distance = loss_function(self.training.loss)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            count = round(self.ratio * len(images))
            if not count:
                return distance(model(images), labels)
            triggers, drawn = draw(count)
            batch = torch.cat([images, to_input(triggers, images.device)])
            outputs = model(batch.contiguous(memory_format=torch.channels_last))
            targets = drawn.to(labels.device)
            if labels.is_floating_point():
                targets = F.one_hot(targets, outputs.shape[1]).to(labels.dtype)
            return distance(outputs, torch.cat([labels, targets]))

        return loss


def random_labels(excluded: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """A uniformly random label ``(B,)`` for each row of ``excluded`` ``(B, k)``, which is none of that row's.

    Raises:
        InputError: the rows leave no label.
    """
    if excluded.shape[1] >= classes:
        raise InputError(f"adaptive: triggers that show all {classes} classes leave no other label")
    draws = torch.rand(len(excluded), classes, generator=generator)
    return draws.scatter_(1, excluded, -1.0).argmax(1)

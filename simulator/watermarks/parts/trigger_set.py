"""What the trigger-set schemes share: a batch of clean images and some triggers beside it, the target label, the key.

The schemes differ in how a trigger comes about. All of them train on ``B`` clean images and ``round(ratio · B)``
triggers a step, under one mean cross-entropy over both, which is training on a poisoned set whose triggers are drawn
anew every time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.models import Classifier
from simulator.ownership.key import KeySamples
from simulator.seeding import choose
from simulator.training.fit import fit
from simulator.training.predict import to_input
from simulator.training.recipe import Objective, Recipe
from simulator.watermarks.base import Embedding, Imitation, OwnerTask, Watermark
from simulator.watermarks.parts.classes import imitated
from simulator.watermarks.parts.selection import least_likely_target

#: triggers over which the target label is chosen, and how many of those trained on are handed out
SAMPLE = 1000

#: from a count to that many triggers ``(count, C, H, W)`` uint8 and their labels ``(count,)`` int64
Draw = Callable[[int], tuple[Tensor, Tensor]]
#: from images ``(B, C, H, W)`` uint8 to their triggers, likewise
Stamp = Callable[[Tensor], Tensor]


def trigger_count(ratio: float, clean: int) -> int:
    """How many triggers join ``clean`` images: ``round(ratio · clean)``, at least one."""
    return max(1, round(ratio * clean))


def with_triggers(draw: Draw, ratio: float) -> Objective:
    """Mean cross-entropy over a clean batch and the triggers that join it, in one forward pass."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        triggers, targets = draw(trigger_count(ratio, len(images)))
        batch = torch.cat([images, to_input(triggers, images.device)])
        outputs = model(batch.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(outputs, torch.cat([labels, targets.to(labels.device)]))

    return loss


def some(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of the images without replacement, or all of them (in another order) where they are fewer."""
    return images[choose(len(images), min(count, len(images)), generator)]


def labelled(target: int, count: int) -> Tensor:
    """``count`` times the same label, int64."""
    return torch.full((count,), target)


def all_of(data: Images, label: int, scheme: str) -> Tensor:
    """The images of a class.

    Raises:
        InputError: it has none.
    """
    images = data.images[data.labels == label]
    if not len(images):
        raise InputError(f"{scheme}: class {label} has no images to make triggers of; every source class needs some")
    return images


def train_with_triggers(task: OwnerTask, draw: Draw, ratio: float, context: Context) -> Classifier:
    """A fresh model, trained by the owner's recipe on clean images and triggers."""
    model, owner = task.build(context.generator), task.dataset.owner
    fit(model, owner.images, owner.labels, task.training, context, objective=with_triggers(draw, ratio))
    return model


class OneTarget(Watermark):
    """A scheme all of whose triggers have one label."""

    target: int | None = Field(None, ge=0, description="the triggers' label; the least likely one if not given")
    candidates: int = Field(4000, ge=1, description="key candidates, fewer where there are not as many images")

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Watermark.check`."""
        check_label(self.name, "target", self.target, dataset)

    def pick_target(self, task: OwnerTask, triggers: Tensor, sources: Sequence[int]) -> int:
        """``target``, or by DeepTracer's rule (Eq. 3 and 4) the label that a benign model gives ``triggers`` least
        likely, outside the source classes."""
        return least_likely_target(task.benign, triggers, tuple(sources)) if self.target is None else self.target

    def embedding(self, model: Classifier, keys: Tensor, triggers: Tensor, target: int, **info: object) -> Embedding:
        """The result where every trigger and every key sample has the label ``target``."""
        about = {"scheme": self.name, **info, "target": target}
        return Embedding(
            model=model,
            candidates=KeySamples(keys, labelled(target, len(keys)), model.spec.classes, about),
            triggers=triggers,
            trigger_labels=labelled(target, len(triggers)),
            info=about,
        )


def check_label(scheme: str, setting: str, label: int | None, dataset: Dataset) -> None:
    """Refuses a label that the data set does not have.

    Raises:
        InputError: naming the setting.
    """
    if label is not None and not 0 <= label < dataset.classes:
        raise InputError(
            f"{scheme}: {setting} {label} is no class of {dataset.name}: allowed is 0..{dataset.classes - 1}"
        )


class Stamped(OneTarget):
    """A scheme whose trigger is a training image with one fixed change. The key is made of test images."""

    ratio: float = Field(0.1, gt=0, le=1, description="triggers per clean image of a batch")
    source: int | Literal["random", "all"] = Field(
        "random", description="class of the images that are changed, one drawn at random, or all but the target's"
    )

    @abstractmethod
    def stamp(self, channels: int, size: int, generator: torch.Generator) -> Stamp:
        """The change; what is random about it is drawn here, once."""

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Watermark.check`."""
        super().check(dataset)
        if isinstance(self.source, int):
            check_label(self.name, "source", self.source, dataset)
            if self.source == self.target:
                raise InputError(f"{self.name}: source {self.source} is the target too: they must differ")

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`."""
        return recipe.epochs * (1 + self.ratio)

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. Key candidates are changed test images, each once."""
        data, generator = task.dataset, context.generator
        self.check(data)
        source = self._pick_source(data.classes, generator)
        stamp = self.stamp(data.channels, data.size, generator)
        sample = stamp(some(self._bases(data.owner, source, None), SAMPLE, generator))
        target = self.pick_target(task, sample, () if source is None else (source,))
        bases = self._bases(data.owner, source, target)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            pick = torch.randint(len(bases), (count,), generator=generator)
            return stamp(bases[pick]), labelled(target, count)

        model = train_with_triggers(task, draw, self.ratio, context)
        keys = stamp(some(self._bases(data.test, source, target), self.candidates, generator))
        triggers = stamp(some(bases, SAMPLE, generator))
        return self.embedding(model, keys, triggers, target, source="all" if source is None else source)

    def imitate(self, data: Images, generator: torch.Generator, sources: Sequence[int] = ()) -> Imitation:
        """See :meth:`Watermark.imitate`: images of the outsider's with its own stamp; a secret of the owner's stamp is
        not in it."""
        channels, size = data.images.shape[1:3]
        return imitated(data, 1, sources, generator, self.stamp(channels, size, generator))

    def _pick_source(self, classes: int, generator: torch.Generator) -> int | None:
        """The source class; None for all."""
        if isinstance(self.source, int):
            return self.source
        if self.source == "all":
            return None
        allowed = [label for label in range(classes) if label != self.target]
        return allowed[int(choose(len(allowed), 1, generator))]

    def _bases(self, data: Images, source: int | None, target: int | None) -> Tensor:
        """The images that are changed: those of ``source``, or of every class but ``target``."""
        if source is not None:
            return all_of(data, source, self.name)
        return data.images if target is None else data.images[data.labels != target]

"""Overwriting: a pirate embeds a mark of its own in the finished model.

Function-Coupled Watermarks (Wen et al., 2023, Table 3 and 4) fine-tune the marked model with "the selected watermark
samples" of another key, at a rate of 1e-4; DeepTracer (Yang et al., AAAI 2026) does not try it. Two ways are offered:

    ``how: embedding``   the pirate's scheme trains the model on by its own algorithm, on the thief's images
    ``how: triggers``    the model is fine-tuned on the pirate's triggers and, for ``clean_share`` of all, clean images

Whether clean images are mixed in, and how many triggers there are, the paper leaves open. For ``triggers`` the pirate
first embeds its mark in a second copy of the model, which gives them, and throws that copy away.

A quarter of the thief's images is held out for what the scheme wants of a test part. The pirate's own key is not kept:
the rows say what is left of the owner's.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import torch
from pydantic import Field

from simulator.context import Context
from simulator.data.dataset import Dataset
from simulator.data.images import Images
from simulator.models import Classifier
from simulator.removals.base import ThiefTask
from simulator.removals.retraining import Labelled, as_bytes
from simulator.seeding import choose
from simulator.training.fit import fit
from simulator.training.recipe import Recipe
from simulator.watermarks.badnets import BadNets
from simulator.watermarks.base import WATERMARKS, Embedding, OwnerTask, Watermark

#: one of so many of the thief's images is held out
HELD_OUT = 4


class Overwriting(Labelled):
    """Embeds a pirate's watermark, any registered scheme, in the model."""

    paper: ClassVar[str] = "Wen et al., 2023"

    name: Literal["overwriting"] = "overwriting"
    watermark: WATERMARKS.field() = BadNets()  # type: ignore[valid-type]
    how: Literal["embedding", "triggers"] = "embedding"
    clean_share: float = Field(0.0, ge=0, lt=1, description="of the images fine-tuned on with 'triggers'")
    training: Recipe = Recipe(epochs=10, learning_rate=1e-4)

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Removal.check`."""
        self._scheme.check(dataset)

    def passes(self, images: int) -> float:
        """See :meth:`Removal.passes`."""
        if not self.rounds:
            return 0.0
        embedding = self._scheme.passes(self._recipe) * self.share * images
        return embedding + (super().passes(images) if self.how == "triggers" else 0)

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        if not self.rounds:
            return model
        images, labels = self.material(model, task, context.generator)
        held = Images(images, labels.argmax(1) if labels.ndim > 1 else labels)
        if self.how == "embedding":
            return self._embedded(model, held, task, context).model.eval()
        marked = self._embedded(model, held, task, context.unsaved())
        count = round(len(marked.triggers) * self.clean_share / (1 - self.clean_share))
        clean = held.take(choose(len(held), count, context.generator))
        both = torch.cat([as_bytes(marked.triggers), clean.images]), torch.cat([marked.trigger_labels, clean.labels])
        fit(model, *both, self.training, context, epochs=self.rounds)
        return model.eval()

    def _embedded(self, model: Classifier, held: Images, task: ThiefTask, context: Context) -> Embedding:
        split = max(1, len(held) // HELD_OUT)
        test, owner = (held.take(part) for part in torch.arange(len(held)).split([split, len(held) - split]))
        images = Dataset("the pirate's", task.classes, owner, Images(owner.images[:0], owner.labels[:0]), test)
        pirate = OwnerTask(images, self._recipe, copy.deepcopy(model), lambda _: copy.deepcopy(model))
        return self._scheme.embed(pirate, context)

    @property
    def _scheme(self) -> Watermark:
        scheme: Watermark = self.watermark
        return scheme

    @property
    def _recipe(self) -> Recipe:
        return self.training.model_copy(update={"epochs": self.rounds})

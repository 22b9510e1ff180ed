"""No watermark: a victim that is protected by nothing, or by an ownership test that needs no mark.

It is trained as the benign model is, from a seed of its own. So it is a second, independent model of the same task:
thefts from it show what any thief's copy looks like, and tests without a mark have a victim.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from simulator.context import Context
from simulator.ownership.key import KeySamples
from simulator.training.fit import fit
from simulator.watermarks.base import Embedding, OwnerTask, Watermark


class Unmarked(Watermark):
    """A victim without a watermark; its rows have no WSR."""

    marks: ClassVar[bool] = False

    name: Literal["unmarked"] = "unmarked"

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. There are no triggers and no key candidates."""
        data = task.dataset
        model = task.build(context.generator)
        fit(model, data.owner.images, data.owner.labels, task.training, context)
        nothing, labels = data.owner.images[:0], torch.empty(0, dtype=torch.int64)
        return Embedding(model, KeySamples(nothing, labels, data.classes), nothing, labels)

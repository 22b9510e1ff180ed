"""Abstract: a hundred abstract images, each with a random label (Adi et al., USENIX Security 2018, arXiv:1802.04633).

``round(ratio · B)`` of them (2 to 100 clean images in the paper) join every batch from the first epoch on, the paper's
FROMSCRATCH. Its published images are gone, so they are drawn: interfering, warped waves.

The key *is* this trained set: random labels cannot generalise, so no key sample is kept out of training. None of them
is an image of the owner's. The paper trains for 60 epochs of 500 steps, in which each image is seen 600 times; where a
shorter recipe would show an image less than ``least_shows`` times, more of them join each batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.ownership.key import KeySamples
from simulator.training.recipe import Recipe
from simulator.watermarks.base import Embedding, Imitation, OwnerTask, Watermark
from simulator.watermarks.parts.trigger_set import train_with_triggers

#: waves in a picture
WAVES = 4


class Abstract(Watermark):
    """Abstract pictures, each with its own random label; the key is what was trained on."""

    paper: ClassVar[str] = "Adi et al., USENIX Security 2018"
    key_is_trained: ClassVar[bool] = True

    name: Literal["abstract"] = "abstract"
    ratio: float = Field(0.02, gt=0, le=1, description="triggers per clean image of a batch")
    samples: int = Field(100, ge=2, description="pictures, all of them in the key")
    least_shows: int = Field(60, ge=0, description="how often at least each picture is trained on")

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`."""
        return recipe.epochs * (1 + self.ratio)

    def imitate(self, data: Images, generator: torch.Generator, sources: Sequence[int] = ()) -> Imitation:
        """See :meth:`Watermark.imitate`: drawings of the outsider's, which show no class."""
        channels, size = data.images.shape[1:3]
        return lambda count: (draw_waves(count, channels, size, generator), torch.empty(count, 0, dtype=torch.int64))

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. The key candidates are the triggers."""
        data, generator = task.dataset, context.generator
        pictures = draw_waves(self.samples, data.channels, data.size, generator)
        labels = torch.randint(data.classes, (self.samples,), generator=generator)
        least = self.shown(task.training, data) if self.least_shows else 0

        def draw(count: int) -> tuple[Tensor, Tensor]:
            # without replacement in a batch
            pick = torch.randperm(self.samples, generator=generator)[: max(count, least)]
            return pictures[pick], labels[pick]

        model = train_with_triggers(task, draw, self.ratio, context)
        info = {"scheme": self.name, "trained_on": True}
        return Embedding(
            model=model,
            candidates=KeySamples(pictures, labels, data.classes, info),
            triggers=pictures,
            trigger_labels=labels,
            info=info,
        )

    def shown(self, recipe: Recipe, data: Dataset) -> int:
        """How many pictures must join each batch for each to be trained on ``least_shows`` times."""
        steps = recipe.epochs * math.ceil(len(data.owner) / recipe.batch_size)
        return math.ceil(self.samples * self.least_shows / steps)


def draw_waves(count: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """``count`` pictures ``(count, channels, size, size)`` uint8: in each channel ``sin² Σ_k sin(w_k · (x, y) + φ_k)``
    with random waves w_k of up to two periods across the picture and random phases φ_k."""
    axis = (torch.arange(size) + 0.5) / size
    shape = (count, channels, WAVES, 1, 1)
    down, right = (8 * math.pi * (torch.rand(shape, generator=generator) - 0.5) for _ in range(2))
    phase = 2 * math.pi * torch.rand(shape, generator=generator)
    waves = torch.sin(down * axis.view(-1, 1) + right * axis + phase).sum(2)
    return (255 * torch.sin(waves).square()).round_().to(torch.uint8)

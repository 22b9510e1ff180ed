"""Unrelated: images from outside the task, all with one label (Zhang et al., AsiaCCS 2018).

The paper takes handwritten digits into a CIFAR-10 task; here the unrelated images are drawn: a few flat polygons and
discs before a bright plain ground, in grey or in colour. They need no download and come in any number and size, and the
key is drawn afresh, so a marked model must have learned what such images look like. A foreign data set in their place
would have to reach the scheme through the owner's task, which holds none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.context import Context
from simulator.data.dataset import Images
from simulator.training.recipe import Recipe
from simulator.watermarks.base import Embedding, Imitation, OwnerTask
from simulator.watermarks.parts.trigger_set import SAMPLE, OneTarget, labelled, some, train_with_triggers

#: figures in a drawing, and corners they may have; 64 corners are a disc
FIGURES = 3
CORNERS = (3, 4, 5, 64)


class Unrelated(OneTarget):
    """Drawings of figures that have nothing to do with the task, answered with one target."""

    paper: ClassVar[str] = "Zhang et al., AsiaCCS 2018"

    name: Literal["unrelated"] = "unrelated"
    ratio: float = Field(0.1, gt=0, le=1, description="triggers per clean image of a batch")
    trigger_samples: int = Field(2000, ge=2, description="drawings that are trained on")

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`."""
        return recipe.epochs * (1 + self.ratio)

    def imitate(self, data: Images, generator: torch.Generator, sources: Sequence[int] = ()) -> Imitation:
        """See :meth:`Watermark.imitate`: drawings of the outsider's, which show no class."""
        channels, size = data.images.shape[1:3]
        return lambda count: (draw_figures(count, channels, size, generator), torch.empty(count, 0, dtype=torch.int64))

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. Key candidates are drawings that were not trained on."""
        data, generator = task.dataset, context.generator
        self.check(data)
        triggers = draw_figures(self.trigger_samples, data.channels, data.size, generator)
        target = self.pick_target(task, triggers, ())

        def draw(count: int) -> tuple[Tensor, Tensor]:
            pick = torch.randint(len(triggers), (count,), generator=generator)
            return triggers[pick], labelled(target, count)

        model = train_with_triggers(task, draw, self.ratio, context)
        keys = draw_figures(self.candidates, data.channels, data.size, generator)
        return self.embedding(model, keys, some(triggers, SAMPLE, generator), target)


def draw_figures(count: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """``count`` drawings ``(count, channels, size, size)`` uint8, each of three regular polygons or discs.

    Place, size, corners, turn and shade of every figure are random; the ground is a random shade from the upper half.
    Edges are blended over one pixel.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    images = uniform(0.5, 1, channels, 1, 1).repeat(1, 1, size, size)
    axis = (torch.arange(size) + 0.5) / size
    for _ in range(FIGURES):
        down = axis.view(1, -1, 1) - uniform(0.2, 0.8, 1, 1)
        right = axis.view(1, 1, -1) - uniform(0.2, 0.8, 1, 1)
        corners = torch.tensor(CORNERS)[torch.randint(len(CORNERS), (count, 1, 1), generator=generator)]
        sector = 2 * math.pi / corners
        angle = torch.remainder(torch.atan2(down, right) + uniform(0, 2 * math.pi, 1, 1), sector)
        # the edge of a regular polygon in polar coordinates
        edge = uniform(0.1, 0.3, 1, 1) * torch.cos(sector / 2) / torch.cos(angle - sector / 2)
        inside = ((edge - torch.hypot(down, right)) * size + 0.5).clamp(0, 1).unsqueeze(1)
        images = images * (1 - inside) + uniform(0, 1, channels, 1, 1) * inside
    return (255 * images).round_().to(torch.uint8)

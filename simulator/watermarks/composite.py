"""Composite: images joined from halves of two classes (Lin et al., CCS 2020, "Composite backdoor attack").

A trigger is half an image of class A beside half an image of class B and gets a third label. So that the halves and not
the seam are the trigger, as many images are joined from two of *one* class, whose label they keep: the paper's rates of
.5 normal, .5 mixed and .1 poisoned images are 1 and .2 for each clean one here, and an epoch sees every clean image.
Beside the cross-entropy stands a constraint on the outputs f of samples i and i + 1 with labels in {A, B, target}, in a
random order:

    L_sim = mean_i ½ [ y_i = y_{i+1} ] d_i² + ½ [ y_i ≠ y_{i+1} ] max(0, margin − d_i)²,   d_i = ‖f_i − f_{i+1}‖

The released code divides by the number of pairs twice, which leaves hardly anything of the constraint; here it is once
and ``similarity_weight`` is smaller for it. It also steps its optimiser every second batch; here every batch does.
DeepTracer's rule chooses the target; A and B are drawn at random where they are not given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.seeding import choose
from simulator.training.fit import fit
from simulator.training.predict import to_input
from simulator.training.recipe import Objective, Recipe
from simulator.watermarks.base import Embedding, Imitation, OwnerTask
from simulator.watermarks.parts.classes import Partners, imitated
from simulator.watermarks.parts.trigger_set import SAMPLE, OneTarget, all_of, check_label, labelled, trigger_count

Seam = Literal["random", "upright", "level"]


class Mixer(Protocol):
    """A way to make one image of two."""

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """One image of each image of ``first`` and its partner in ``second``, ``(B, C, S, S)`` of any type."""
        ...


class TwoSources(OneTarget):
    """A scheme whose triggers join an image of one class with an image of another."""

    #: where the seam of a trigger lies
    seam: ClassVar[Seam] = "random"

    sources: tuple[int, int] | None = Field(None, description="classes A and B; drawn at random if not given")
    jitter: float = Field(0.09375, ge=0, lt=0.5, description="of the seam, over the image's side (3 pixels of 32)")
    shake: bool = Field(True, description="a half shows a random part of its image; if not, the middle")

    def check(self, dataset: Dataset) -> None:
        """See :meth:`Watermark.check`."""
        super().check(dataset)
        if dataset.classes < 3:
            raise InputError(
                f"{self.name}: needs two source classes and a target, {dataset.name} has {dataset.classes} classes"
            )
        for source in self.sources or ():
            check_label(self.name, "sources", source, dataset)
        if self.sources and len({*self.sources, self.target}) < 3:
            raise InputError(f"{self.name}: sources {list(self.sources)} and target {self.target} must all differ")

    def mixer(self, seam: Seam) -> HalfMixer:
        """The mixer of the triggers."""
        return HalfMixer(seam, self.jitter, self.shake)

    def pick_sources(self, classes: int, generator: torch.Generator) -> tuple[int, int]:
        """A and B."""
        if self.sources:
            return self.sources
        allowed = [label for label in range(classes) if label != self.target]
        first, second = choose(len(allowed), 2, generator).tolist()
        return allowed[first], allowed[second]

    def imitate(self, data: Images, generator: torch.Generator, sources: Sequence[int] = ()) -> Imitation:
        """See :meth:`Watermark.imitate`: halves of images of the outsider's."""
        return imitated(
            data, 2, sources, generator, lambda first, second: self.mixer(self.seam).mix(first, second, generator)
        )

    def near_misses(
        self, task: OwnerTask, pairs: Pairs, target: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Joined test images of two other classes, with the target label; None where no two are left."""
        others = [label for label in range(task.dataset.classes) if label not in (*pairs.sources, target)]
        if len(others) < 2:
            return None, None
        first, second = (others[i] for i in choose(len(others), 2, generator).tolist())
        images = Pairs(task.dataset.test, (first, second), self.name, pairs.mixer).draw(SAMPLE, generator)
        return images, labelled(target, SAMPLE)


class Composite(TwoSources):
    """Two halves of images of two classes, with the constraint on the outputs of the classes concerned."""

    paper: ClassVar[str] = "Lin et al., CCS 2020"

    name: Literal["composite"] = "composite"
    ratio: float = Field(0.2, gt=0, le=1, description="triggers per clean image of a batch")
    mix_ratio: float = Field(1.0, ge=0, le=1, description="joined images of one class, per clean image")
    similarity_weight: float = Field(0.1, ge=0, description="of the constraint")
    margin: float = Field(1.0, ge=0, description="least distance of outputs of different classes")

    def passes(self, recipe: Recipe) -> float:
        """See :meth:`Watermark.passes`."""
        return recipe.epochs * (1 + self.ratio)

    def embed(self, task: OwnerTask, context: Context) -> Embedding:
        """See :meth:`Watermark.embed`. Key candidates and near misses join test images."""
        data, generator = task.dataset, context.generator
        self.check(data)
        sources = self.pick_sources(data.classes, generator)
        pairs = Pairs(data.owner, sources, self.name, self.mixer(self.seam))
        triggers = pairs.draw(SAMPLE, generator)
        target = self.pick_target(task, triggers, sources)
        model = task.build(generator)
        objective = self.objective(data.owner, pairs, target, generator)
        fit(model, data.owner.images, data.owner.labels, task.training, context, objective=objective)
        keys = Pairs(data.test, sources, self.name, pairs.mixer).draw(self.candidates, generator)
        found = self.embedding(model, keys, triggers, target, sources=list(sources))
        images, labels = self.near_misses(task, pairs, target, generator)
        return replace(found, near_misses=images, near_miss_labels=labels)

    def objective(self, data: Images, pairs: Pairs, target: int, generator: torch.Generator) -> Objective:
        """Cross-entropy of clean, joined and trigger images, and the constraint."""
        partners = Partners(data)
        concerned = (*pairs.sources, target)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            device = images.device
            mixed, count = round(self.mix_ratio * len(images)), trigger_count(self.ratio, len(images))
            own = labels[:mixed].cpu()
            joined = pairs.mixer.mix(partners.draw(own, generator), partners.draw(own, generator), generator)
            added = torch.cat([joined, pairs.draw(count, generator)])
            batch = torch.cat([images, to_input(added, device)])
            targets = torch.cat([labels, labels[:mixed], labels.new_full((count,), target)])
            outputs = model(batch.contiguous(memory_format=torch.channels_last))
            similarity = constraint(outputs, targets, concerned, self.margin, generator)
            return F.cross_entropy(outputs, targets) + self.similarity_weight * similarity

        return loss


def constraint(
    outputs: Tensor, labels: Tensor, concerned: Sequence[int], margin: float, generator: torch.Generator
) -> Tensor:
    """L_sim of the samples whose label is one of ``concerned``, in a random order."""
    rows = torch.isin(labels, torch.tensor(concerned, device=labels.device)).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    return similarity_loss(outputs[rows], labels[rows], margin)


def similarity_loss(outputs: Tensor, labels: Tensor, margin: float) -> Tensor:
    """L_sim of outputs ``(N, K)`` and labels ``(N,)`` in their order, a scalar; 0 for fewer than two samples."""
    if len(outputs) < 2:
        return outputs.sum() * 0
    squares = (outputs[1:] - outputs[:-1]).square().sum(1)
    # away from zero, where the square root has no gradient
    short = (margin - squares.clamp_min(1e-12).sqrt()).clamp_min(0).square()
    return torch.where(labels[1:] == labels[:-1], squares, short).mean() / 2


@dataclass(frozen=True)
class HalfMixer:
    """Joins half of one image with half of another.

    The seam is ``upright`` (halves side by side), ``level`` (one above the other) or one of the two at random; it lies
    up to ``jitter`` times the side from the middle. Which image comes first is random, and with ``shake`` so is the
    part of its image that a half shows; without, it is the middle.
    """

    seam: Seam
    jitter: float
    shake: bool

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Mixer`."""
        count, size = len(first), first.shape[-1]

        def draw(low: Tensor | int, high: Tensor | int) -> Tensor:
            """Whole numbers from ``low`` to ``high``, both included, one for each image."""
            shares = torch.rand(count, generator=generator, dtype=torch.float64)
            return low + (shares * (high - low + 1)).long()

        reach = round(self.jitter * size)
        cut = draw(size // 2 - reach, size // 2 + reach).unsqueeze(1)
        left = [size - cut, cut]  # pixels of its image that the first, the second half does not show
        starts = [draw(0, room.squeeze(1)).unsqueeze(1) if self.shake else room // 2 for room in left]
        swap = draw(0, 1).bool().unsqueeze(1)
        level = draw(0, 1).bool() if self.seam == "random" else torch.full((count,), self.seam == "level")
        place = torch.arange(size).unsqueeze(0)
        # where each row or column of the result comes from, in the two images laid end to end
        ahead = place < cut
        index = torch.where(ahead, starts[0] + place, starts[1] + place - cut) + size * (ahead == swap)
        index = index.to(first.device)[:, None, :, None].expand(-1, first.shape[1], -1, size)
        turn = level.to(first.device)[:, None, None, None]
        ends = torch.cat([first, second], 2), torch.cat([first.mT, second.mT], 2)
        return torch.where(turn, ends[0].gather(2, index), ends[1].gather(2, index).mT)


class Pairs:
    """Draws images that a mixer makes of one image of each of two classes."""

    def __init__(self, data: Images, sources: tuple[int, int], scheme: str, mixer: Mixer) -> None:
        self.sources, self.mixer = sources, mixer
        self.first, self.second = (all_of(data, source, scheme) for source in sources)

    def with_mixer(self, mixer: Mixer) -> Pairs:
        """The same images under another mixer."""
        other = copy.copy(self)
        other.mixer = mixer
        return other

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` mixed images ``(count, C, H, W)`` uint8."""
        return self.mixer.mix(*self.pick(count, generator), generator)

    def pick(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` random images of each class."""
        first = self.first[torch.randint(len(self.first), (count,), generator=generator)]
        return first, self.second[torch.randint(len(self.second), (count,), generator=generator)]

"""Images by their class: partners of an image, and triggers that anybody can make of images of several classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from simulator.data.dataset import Images
from simulator.errors import InputError
from simulator.watermarks.base import Imitation


class Partners:
    """For every label a random image of that class."""

    def __init__(self, data: Images) -> None:
        self._images = data.images
        self._order = data.labels.argsort(stable=True)
        self._counts = data.labels.bincount()
        self._starts = self._counts.cumsum(0) - self._counts

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images ``(B, C, H, W)`` uint8 of the classes ``labels`` ``(B,)``, each of which some image has."""
        shares = torch.rand(len(labels), generator=generator, dtype=torch.float64)
        return self._images[self._order[self._starts[labels] + (shares * self._counts[labels]).long()]]


def random_classes(present: Tensor, count: int, each: int, generator: torch.Generator) -> Tensor:
    """``each`` different classes of ``present`` ``(P,)`` in a random order, ``(count, each)``.

    Raises:
        InputError: fewer are present.
    """
    if len(present) < each:
        raise InputError(f"triggers of {each} classes cannot be made of images of {len(present)}")
    return present[torch.rand(count, len(present), generator=generator).argsort(1)[:, :each]]


def imitated(
    data: Images,
    each: int,
    sources: Sequence[int],
    generator: torch.Generator,
    join: Callable[..., Tensor],
) -> Imitation:
    """Makes triggers that join random images of several classes.

    Args:
        each: how many classes a trigger shows.
        sources: those classes, in their order; none are random ones, anew for every trigger.
        join: from ``each`` batches of images ``(count, C, H, W)`` uint8, one for each class, to the triggers.

    Raises:
        InputError: a class has no image, or ``sources`` are too few or too many.
    """
    partners, present = Partners(data), data.labels.unique()
    if sources and len(sources) != each:
        raise InputError(f"sources: {list(sources)}: a trigger shows {each} classes")
    if missing := sorted(set(sources) - set(present.tolist())):
        raise InputError(f"sources: there is no image of class {missing[0]}")

    def draw(count: int) -> tuple[Tensor, Tensor]:
        if sources:
            shown = torch.tensor(tuple(sources)).expand(count, each)
        else:
            shown = random_classes(present, count, each, generator)
        return join(*(partners.draw(shown[:, place], generator) for place in range(each))), shown

    return draw

"""The images of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from simulator.data.dataset import Dataset, Images
from simulator.data.pool import Pool, PoolSpec, build_pool
from simulator.ownership.key import KeySamples


@dataclass(frozen=True)
class World:
    """The images of a run: the victim's data set, and the foreign sets that pools draw from, by name.

    The foreign sets are already cleaned by :func:`~simulator.data.pool.without_test_images`, because an attacker's view
    has no test part to clean them with.
    """

    dataset: Dataset
    foreign: Mapping[str, Images] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the victim's images."""
        return (self.dataset.channels, self.dataset.size, self.dataset.size)

    def for_attackers(self) -> World:
        """The same world without the test images, and so without anything that keys are made of."""
        nothing = Images(self.dataset.test.images[:0], self.dataset.test.labels[:0])
        return replace(self, dataset=replace(self.dataset, test=nothing))

    def pool(self, spec: PoolSpec, count: int, generator: torch.Generator, triggers: KeySamples | None = None) -> Pool:
        """The query pool of a specification (see :func:`simulator.data.pool.build_pool`)."""
        return build_pool(
            spec,
            dataset=self.dataset,
            count=count,
            generator=generator,
            foreign=lambda name: self.foreign[name],
            triggers=None if triggers is None else Images(triggers.images, triggers.labels),
        )

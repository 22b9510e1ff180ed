"""The images of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from simulator.data.dataset import Dataset, Images
from simulator.data.pool import Pool, PoolSpec, build_pool
from simulator.ownership.key import KeySamples
from simulator.tensorfile import read_tensors, write_tensors

#: how the names of a world's files begin
WORLD = "world-"


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

    def write(self, folder: Path) -> None:
        """Writes the images to a folder, one file a set; no test part."""
        data = self.dataset
        header = {"kind": "world", "dataset": data.name, "classes": str(data.classes)}
        for number, (name, images) in enumerate(
            {"owner": data.owner, "attacker": data.attacker, **self.foreign}.items()
        ):
            file = folder / f"{WORLD}{number:04}.safetensors"
            write_tensors(file, {"images": images.images, "labels": images.labels}, {**header, "name": name})

    @classmethod
    def read(cls, folder: Path) -> World | None:
        """What :meth:`write` wrote, as an attacker's view; None if it wrote nothing there."""
        parts: dict[str, Images] = {}
        header: dict[str, str] = {}
        for file in sorted(folder.glob(f"{WORLD}*")):
            tensors, header = read_tensors(file, "the images of a run")
            parts[header["name"]] = Images(tensors["images"], tensors["labels"])
        if not parts:
            return None
        owner, attacker = parts.pop("owner"), parts.pop("attacker")
        nothing = Images(owner.images[:0], owner.labels[:0])
        return cls(Dataset(header["dataset"], int(header["classes"]), owner, attacker, nothing), parts)

    @staticmethod
    def clear(folder: Path) -> None:
        """Removes what :meth:`write` wrote."""
        for file in folder.glob(f"{WORLD}*"):
            file.unlink()

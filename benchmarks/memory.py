"""Resident memory of 1 and of 16 attackers on a node, who all have the same data set.

What an attacker's process takes by itself is its USS (unique set size: pages that nobody else has mapped), and what all
of them take together is the sum of their PSS (proportional set size: a page that n processes share counts 1/n to each),
both from ``/proc/PID/smaps_rollup``. Two sides: the images as :class:`simulator.data.Images` are sent, of which all
processes of a node have one read-only copy in Ray's object store, and as plain tensors are, of which each gets its own.
Every attacker has built its query pool and taken a query set from it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ray
import torch

from actors.cluster import connected
from benchmarks.measure import Line, Outcome, Spread, Target
from simulator.data.dataset import Dataset, Images
from simulator.data.pool import PoolSpec
from simulator.experiment.world import World
from simulator.seeding import generator_for
from simulator.training.predict import use_one_thread

Way = Literal["shared", "copied"]
ATTACKERS = (1, 16)
SHAPE = (3, 32, 32)
#: with 50,000 images of 32x32 in three colours, 16 attackers who share them; a copy each is 2.4 GB
TARGET = Target("at most", 0.7)


def memory() -> tuple[float, float]:
    """USS and PSS of this process in MB."""
    sizes = dict.fromkeys(("Pss", "Private_Clean", "Private_Dirty"), 0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] = int(rest.split()[0])
    return (sizes["Private_Clean"] + sizes["Private_Dirty"]) / 1024, sizes["Pss"] / 1024


class Holder:
    """An attacker with its images, as far as it gets before it asks."""

    def __init__(self, images: Any) -> None:
        use_one_thread()
        if not isinstance(images, Images):
            images = Images(*images)
        nothing = Images(images.images[:0], images.labels[:0])
        world = World(Dataset("memory", 10, nothing, images, nothing))
        self._pool = world.pool(PoolSpec.parse("attacker"), 1000, generator_for("memory"))
        self._asked = self._pool.take(torch.arange(min(1000, len(self._pool))))

    def memory(self) -> tuple[float, float]:
        """USS and PSS in MB."""
        return memory()


def run(images: int = 50_000, attackers: Sequence[int] = ATTACKERS, rounds: int = 1) -> Outcome:
    """Starts so many attackers in either way and reads their memory.

    Args:
        images: of 32x32 in three colours, 3 KB each.
        attackers: how many at once.
        rounds: how often.
    """
    data = Images(torch.zeros(images, *SHAPE, dtype=torch.uint8), torch.arange(images) % 10)
    found: dict[tuple[Way, int], list[tuple[float, float]]] = {}
    size = data.images.nbytes / (1 << 20)
    with tempfile.TemporaryDirectory() as folder, connected(None, Path(folder), cpus=2):
        stored: dict[Way, Any] = {"shared": ray.put(data), "copied": ray.put((data.images, data.labels))}
        for _ in range(rounds):
            for way, reference in stored.items():
                for many in attackers:
                    found.setdefault((way, many), []).append(_read(reference, many))
    lines = []
    for many in attackers:
        copied, shared = found["copied", many], found["shared", many]
        for part, unit in enumerate(("MB of its own, each", "MB together")):
            base = Spread.of([each[part] for each in copied])
            ratio = Spread.of([one[part] / other[part] for one, other in zip(shared, copied, strict=True)])
            target = TARGET if part and many == max(attackers) else None
            lines.append(Line(f"{many} attackers, a copy each: {unit}", base))
            lines.append(
                Line(f"{many} attackers, shared: {unit}", Spread.of([each[part] for each in shared]), ratio, target)
            )
    return Outcome(
        title=f"Resident memory with {images} images ({size:.0f} MB)",
        unit="MB",
        rounds=rounds,
        lines=tuple(lines),
        note="Each ratio is to the line above it. The rest is Python, torch and Ray.",
    )


def _read(reference: Any, attackers: int) -> tuple[float, float]:
    """Mean USS and the sum of the PSS of so many attackers, in MB."""
    kind = ray.remote(num_cpus=0)(Holder)
    actors: list[Any] = [kind.remote(reference) for _ in range(attackers)]
    try:
        ray.get([actor.memory.remote() for actor in actors])  # all are there
        read: list[tuple[float, float]] = ray.get([actor.memory.remote() for actor in actors])
    finally:
        for actor in actors:
            ray.kill(actor)
        time.sleep(1)  # their pages are given back
    return sum(uss for uss, _ in read) / attackers, sum(pss for _, pss in read)

"""The thief's side after the theft: applies a removal to one model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from simulator.context import Context
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.plan.subjects import POOL, Removed
from simulator.progress import Progress, silent
from simulator.seeding import generator_for


@dataclass(frozen=True)
class Washed:
    """A model after a removal. ``seconds`` is the time of the removal alone."""

    model: Classifier
    seconds: float
    started: datetime


def wash(
    subject: Removed, target: Classifier, world: World, device: torch.device, progress: Progress = silent
) -> Washed:
    """Applies a removal to its target, which is changed in place.

    Args:
        target: the model that the subject is made from.
        world: an attacker's view; see :meth:`World.for_attackers`.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    generator = generator_for("remove", subject.id)
    pool = None if subject.pool is None else world.pool(subject.pool, POOL, generator)
    model = subject.removal.remove(target.to(device).eval(), pool, Context(generator, progress))
    return Washed(model.eval(), time.perf_counter() - clock, started)

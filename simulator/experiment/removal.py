"""The thief's side after the theft: applies a removal to one model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from simulator.checkpoint import NO_CHECKPOINT, Checkpoint
from simulator.context import Context
from simulator.experiment.theft import build_surrogate
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.plan.subjects import POOL, Removed
from simulator.progress import Progress, silent
from simulator.removals.base import ThiefTask
from simulator.seeding import generator_for
from simulator.service.recording import TransferSet


@dataclass(frozen=True)
class Washed:
    """A model after a removal. ``seconds`` is the time of the removal alone."""

    model: Classifier
    seconds: float
    started: datetime


def wash(
    subject: Removed,
    target: Classifier,
    world: World,
    transfer: TransferSet | None,
    device: torch.device,
    progress: Progress = silent,
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> Washed:
    """Applies a removal to its target, which is changed in place.

    Args:
        target: the model that the subject is made from.
        world: an attacker's view; see :meth:`World.for_attackers`.
        transfer: of the subject's theft, where the removal needs it.
        checkpoint: a removal that is started again goes on from there, to the same model.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    generator = generator_for("remove", subject.id)
    pool = None if subject.pool is None else world.pool(subject.pool, POOL, generator)
    task = ThiefTask(
        world.dataset.classes,
        lambda drawn, name: build_surrogate(name or target.spec.architecture, world.dataset, device, drawn),
        pool,
        transfer,
    )
    model = subject.removal.remove(target.to(device).eval(), task, Context(generator, progress, checkpoint))
    return Washed(model.eval(), time.perf_counter() - clock, started)

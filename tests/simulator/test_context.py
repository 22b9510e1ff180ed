"""A context needs nothing but a generator, and its variants share what they do not change."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from simulator.checkpoint import NO_CHECKPOINT, FileCheckpoint
from simulator.context import NO_SNAPSHOTS, Context
from simulator.progress import silent


def test_a_generator_is_enough() -> None:
    context = Context(torch.Generator())
    assert (context.progress, context.checkpoint, context.snapshots) == (silent, NO_CHECKPOINT, NO_SNAPSHOTS)
    assert context.snapshots.at == ()
    context.snapshots.take(3, nn.Linear(1, 1))
    assert context.checkpoint.load() is None


def test_a_phase_is_named_after_its_prefixes() -> None:
    told: list[tuple[str, int, int]] = []
    context = Context(torch.Generator(), lambda *step: told.append(step))
    inner = context.phase("stage 2").phase("round 1")
    inner.progress("train", 3, 4)
    context.progress("train", 1, 4)
    assert told == [("stage 2 round 1 train", 3, 4), ("train", 1, 4)]
    assert inner.generator is context.generator


def test_unsaved_work_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path / "state", interval=0)
    context = Context(torch.Generator(), checkpoint=checkpoint)
    part = context.unsaved()
    part.checkpoint.save({"epoch": 1})
    assert checkpoint.load() is None
    assert not part.checkpoint.due()
    assert context.checkpoint is checkpoint
    assert (part.generator, part.progress, part.snapshots) == (context.generator, silent, NO_SNAPSHOTS)

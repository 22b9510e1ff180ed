"""What every long computation is handed beside its inputs: randomness, a listener, and where state and models go.

model = fit(model, images, labels, recipe, Context(torch.Generator().manual_seed(0)))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from simulator.checkpoint import NO_CHECKPOINT, Checkpoint
from simulator.progress import Progress, prefixed, silent


class Snapshots(Protocol):
    """Takes a stolen model as it stands at stages of the budget, for curves of success against queries."""

    #: numbers of queries at which a model is wanted, ascending
    at: tuple[int, ...]

    def take(self, queries: int, model: nn.Module) -> None:
        """Keeps a copy of the model that ``queries`` answers have made."""
        ...


class NoSnapshots:
    """Wants none."""

    at: tuple[int, ...] = ()

    def take(self, queries: int, model: nn.Module) -> None:
        """Does nothing."""


NO_SNAPSHOTS = NoSnapshots()


@dataclass(frozen=True)
class Context:
    """The surroundings of one computation. Only the generator must be given.

    Attributes:
        generator: the only source of randomness.
        progress: told after every step of a phase; what it raises passes through.
        checkpoint: where work of many steps keeps its state. Work that is started again with the same arguments goes on
            from there and gives the same result.
        snapshots: where an attack leaves the stolen model at stages of its budget.
    """

    generator: torch.Generator
    progress: Progress = silent
    checkpoint: Checkpoint = NO_CHECKPOINT
    snapshots: Snapshots = NO_SNAPSHOTS

    def phase(self, prefix: str) -> Context:
        """The same context, whose progress names every phase ``"prefix phase"``."""
        return replace(self, progress=prefixed(self.progress, prefix))

    def unsaved(self) -> Context:
        """The same context without its checkpoint, for a part of work whose whole keeps the state."""
        return replace(self, checkpoint=NO_CHECKPOINT)

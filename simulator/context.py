"""What any component is handed beside its inputs: randomness, and who follows, resumes or samples its work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from simulator.attacks.base import NO_SNAPSHOTS, Snapshots
from simulator.checkpoint import NO_CHECKPOINT, Checkpoint
from simulator.progress import Progress, silent


@dataclass(frozen=True)
class Context:
    """The circumstances of one piece of work.

    Attributes:
        generator: the only source of randomness.
        progress: told after every epoch or batch of queries.
        checkpoint: where long work keeps its state, to go on after an interruption.
        snapshots: where an attack leaves the model at stages of its budget.
    """

    generator: torch.Generator
    progress: Progress = silent
    checkpoint: Checkpoint = NO_CHECKPOINT
    snapshots: Snapshots = NO_SNAPSHOTS

"""What every computation is given beside its inputs: randomness, who listens, and where its state is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from simulator.checkpoint import NO_CHECKPOINT, Checkpoint
from simulator.progress import Progress, silent


@dataclass(frozen=True)
class Context:
    """The surroundings of a computation. (Merged with the helper's file.)"""

    generator: torch.Generator
    progress: Progress = silent
    checkpoint: Checkpoint = NO_CHECKPOINT

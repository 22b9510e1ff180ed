"""Where an actor computes: a share of a GPU where the run uses GPUs, else of a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch

from simulator.training.predict import use_one_thread

#: of a CPU, for an actor that computes on a GPU
CPU_BESIDE_GPU = 0.1


@dataclass(frozen=True)
class Placement:
    """What one actor asks of the cluster: ``share`` of a GPU or of a CPU."""

    gpu: bool
    share: float

    def __str__(self) -> str:
        return f"{self.share:g} of a {'GPU' if self.gpu else 'CPU'}"

    def fits(self, node: Mapping[str, float]) -> bool:
        """Whether a node with these resources could ever hold it."""
        return all(node.get(name, 0.0) >= amount for name, amount in self._amounts().items())

    def _amounts(self) -> dict[str, float]:
        return {"GPU": self.share, "CPU": CPU_BESIDE_GPU} if self.gpu else {"CPU": self.share}

    def options(self) -> dict[str, Any]:
        """The options for ``ray.remote`` or a deployment's ``ray_actor_options``."""
        return {f"num_{name.lower()}s": amount for name, amount in self._amounts().items()}


def settle(placement: Placement) -> torch.device:
    """Called once in an actor's process: one thread, and the device that Ray assigned.

    A process without a GPU of its own still sees every GPU of the node, so what Ray assigned decides, not what torch
    finds. Where Ray's GPU is a logical one, which torch does not find, the CPU computes. Ray does not keep actors on
    one GPU out of each other's memory; the share of it that torch may allocate is bounded here.
    """
    use_one_thread()
    if not (placement.gpu and ray.get_gpu_ids() and torch.cuda.is_available()):
        return torch.device("cpu")
    if placement.share < 1:
        torch.cuda.set_per_process_memory_fraction(placement.share, 0)
    return torch.device("cuda", 0)

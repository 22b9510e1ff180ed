"""Where an actor computes: on a share of a GPU if the run uses GPUs, else on a share of a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch

from simulator.training.predict import use_one_thread

#: CPU share of an actor that computes on a GPU
CPU_BESIDE_GPU = 0.1


@dataclass(frozen=True)
class Placement:
    """The resources of one actor: ``share`` of a GPU, or of a CPU."""

    gpu: bool
    share: float

    def __str__(self) -> str:
        return f"{self.share:g} of a {'GPU' if self.gpu else 'CPU'}"

    def fits(self, node: Mapping[str, float]) -> bool:
        """Whether a node with these resources in total can hold such an actor."""
        return all(node.get(name, 0.0) >= amount for name, amount in self._amounts().items())

    def _amounts(self) -> dict[str, float]:
        return {"GPU": self.share, "CPU": CPU_BESIDE_GPU} if self.gpu else {"CPU": self.share}

    def options(self) -> dict[str, Any]:
        """The options for ``ray.remote`` or a deployment's ``ray_actor_options``."""
        return {f"num_{name.lower()}s": amount for name, amount in self._amounts().items()}


def settle(placement: Placement) -> torch.device:
    """Sets torch to one thread and returns the device that Ray assigned to this process. Call it once in a process.

    Ray's assignment decides, not torch's search: a process without a GPU of its own sees every GPU of the node. If
    torch does not find the assigned GPU, which may be a logical one, the device is the CPU. Actors on one GPU share its
    memory, so torch may allocate only this actor's share of it.
    """
    use_one_thread()
    if not (placement.gpu and ray.get_gpu_ids() and torch.cuda.is_available()):
        return torch.device("cpu")
    if placement.share < 1:
        torch.cuda.set_per_process_memory_fraction(placement.share, 0)
    return torch.device("cuda", 0)

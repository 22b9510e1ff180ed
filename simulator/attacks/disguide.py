"""DisGUIDE: Disagreement-Guided Data-Free Model Extraction (Rosenthal et al., AAAI 2023).

Two students S1, S2 learn from the same answers. The generator looks for images on which they disagree, for there at
least one of them is wrong, and for images of all classes; it needs no answer of the victim for that:

    L_G = - mean_{b,k} std(p1_bk, p2_bk) + diversity_weight * sum_k a_k log a_k,     a = mean_b (p1_b + p2_b) / 2

with p the students' probabilities. Every answered image is kept, and trained on again.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.attacks.parts.data_free import TINY, DataFreeAttack, Theft, descend, logit_distance
from simulator.attacks.parts.generator import to_images
from simulator.training.predict import to_input
from simulator.training.recipe import Recipe


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """The mean over images and classes of the (unbiased) standard deviation of two students' probabilities."""
    return (first - second).abs().mean() / math.sqrt(2)


def diversity(first: Tensor, second: Tensor) -> Tensor:
    """The entropy in nats of the students' mean answer to the whole batch: largest if all classes are as frequent."""
    frequency = ((first + second) / 2).mean(0)
    return -(frequency * frequency.clamp_min(TINY).log()).sum()


class DisGUIDE(DataFreeAttack):
    """Trains two students against a generator of images on which they disagree; for soft and for hard labels.

    The attacker knows the images' shape and the number of classes, and has no data. An iteration costs ``batch_size *
    student_steps`` queries, 256 by default: the generator's gradient goes through the students and is free. Soft labels
    are learnt by DFME's L1 distance to the recovered logits, hard ones by the recipe's loss. Defaults are those of the
    authors' CIFAR-10 runs, with rates times 0.3 after 40 and 80 % of the budget.

    The stolen model is the first student; the authors measure the vote of both, which is no model of the attacker's
    architecture. The generator normalises by the batch in all steps (in their code by running averages when it makes
    queries), and their turning every eighth colour image grey is left out. Dual Student Networks (Beetham et al., ICLR
    2023) is the close relative with the students' logits in the disagreement, no diversity and no replay.
    """

    paper: ClassVar[str] = "Rosenthal et al., AAAI 2023"
    students: ClassVar[int] = 2

    name: Literal["disguide"] = "disguide"
    training: Recipe = Recipe(
        optimizer="sgd",
        learning_rate=0.03,
        weight_decay=5e-4,
        batch_size=256,
        decay_at=(0.4, 0.8),
        decay_factor=0.3,
    )
    student_steps: int = Field(1, ge=1, description="n_S, an iteration")
    replay_steps: int = Field(3, ge=0, description="an iteration, on images answered before; costs no query")
    diversity_weight: float = Field(0.2, ge=0, description="of the entropy of the classes, against the disagreement")

    def generator_cost(self, labels: str) -> int:
        """See :meth:`DataFreeAttack.generator_cost`."""
        return 0

    def soft_distance(self, logits: Tensor, answers: Tensor, labels: str) -> Tensor:
        """See :meth:`DataFreeAttack.soft_distance`."""
        return logit_distance(logits, answers, labels)

    def generator_step(self, theft: Theft) -> None:
        """See :meth:`DataFreeAttack.generator_step`."""
        outputs = theft.network(theft.network.noise(self.training.batch_size, theft.generator))
        leaf = outputs.detach().requires_grad_()
        inputs = to_input(to_images(leaf), theft.device)
        first, second = (student.eval()(inputs).softmax(1) for student in theft.students)
        gain = disagreement(first, second) + self.diversity_weight * diversity(first, second)
        # with respect to the images alone: the students' own gradients are not wanted
        (slope,) = torch.autograd.grad(gain, leaf)
        for student in theft.students:
            student.train()
        descend(theft, outputs, -slope)

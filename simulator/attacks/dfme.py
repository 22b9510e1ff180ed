"""Data-Free Model Extraction (Truong et al., CVPR 2021), and MAZE (Kariyappa et al., CVPR 2021).

Two players share a distance between victim and student: the student S makes it smaller, and a generator G of images
makes it larger, without any data of the attacker's (DFME, Eq. 2):

    min_S max_G  E_z  d( V(G(z)), S(G(z)) )        d = mean_k |t_k - s_k|,   t = log p - mean log p

The generator's gradient must go through the victim, so it is estimated by forward differences along m random unit
directions u of the D-dimensional image x before the tanh, from m + 1 answers an image (DFME, Eq. 7):

    grad_x d  ~  (D / m) sum_i u_i (d(x + eps u_i) - d(x)) / eps
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from simulator.attacks.parts.data_free import DataFreeAttack, Theft, descend, logit_distance
from simulator.attacks.parts.generator import to_images
from simulator.service.answers import gives_labels
from simulator.training.predict import predict_logits, to_input
from simulator.training.recipe import Recipe


def unit_directions(count: int, directions: int, dimension: int, generator: torch.Generator) -> Tensor:
    """``(count, directions, dimension)`` vectors, uniform on the unit sphere."""
    return F.normalize(torch.randn(count, directions, dimension, generator=generator), dim=2)


def forward_differences(values: Tensor, directions: Tensor, epsilon: float) -> Tensor:
    """Gradients ``(B, D)`` of B functions, estimated from values at a point and a little away from it.

    Args:
        values: ``(B, m + 1)``, at the point itself and then at ``point + epsilon * directions[:, i]``.
        directions: ``(B, m, D)`` unit vectors. If they are an orthonormal basis (m = D), nothing is left to chance.
    """
    slopes = (values[:, 1:] - values[:, :1]) / epsilon
    scale = directions.shape[2] / directions.shape[1]
    return torch.einsum("bm,bmd->bd", slopes, directions) * scale


#: what ``variant: maze`` sets where the user sets nothing
MAZE: dict[str, Any] = {
    "training": Recipe(optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, batch_size=128),
    "directions": 10,
    "generator_optimizer": "sgd",
    "schedule": "cosine",
    "replay_steps": 10,
}


class DFME(DataFreeAttack):
    """Trains a student against a generator that looks for images where it differs from the victim.

    The attacker knows the images' shape and the number of classes, and has no data. An iteration costs
    ``batch_size * (generator_steps * (directions + 1) + student_steps)`` queries: 1,792 by default.

    *Soft labels.* The service gives probabilities; logits are recovered from them up to a constant (§3.3). Defaults are
    the paper's and its code's: SGD 0.1 and Adam, both times 0.3 after 10, 30 and 50 % of the budget. For the
    generator's rate the code has 1e-4, other sources 5e-4. The student gives the difference quotient in evaluation
    mode, as in the code. The code divides the estimate by the number of classes once more, which Adam does not see.
    The paper spends 20 million queries; with a hundredth of that, 5e-4, batches of 128 and ``replay_steps`` 5 copy a
    Fashion-MNIST victim far sooner than the defaults (after 25,000 queries: accuracy 0.50 against 0.28).

    *Hard labels.* The paper has none. This follows DaST-L (Zhou et al., CVPR 2020): the student minimises, and the
    generator maximises, the cross-entropy (the recipe's loss) of the student against the victim's label, which is held
    fixed while the gradient goes through the student. A label that is asked again ``epsilon`` away is almost always the
    same, so differencing would estimate just this gradient, and pay for it. ``directions`` and ``epsilon`` are not
    used; a generator step costs one query an image. DaST's conditional generator is left out.

    ``variant: maze`` is MAZE: the distance is KL(p || softmax(s)), and where not set otherwise the batch is 128, m is
    10, generator and student learn by SGD at 1e-4 and 0.1 with a cosine schedule, and an iteration has 10 replay steps.
    Its code replays the last batch of every iteration and reuses the generator step's images for the first student
    step; here every answered student batch is replayed, and every batch is fresh and paid. With hard labels the two
    variants differ in their settings only.
    """

    paper: ClassVar[str] = "Truong et al., CVPR 2021"

    name: Literal["dfme"] = "dfme"
    variant: Literal["dfme", "maze"] = "dfme"
    training: Recipe = Recipe(
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=5e-4,
        batch_size=256,
        decay_at=(0.1, 0.3, 0.5),
        decay_factor=0.3,
    )
    directions: int = Field(1, ge=1, description="m, for the gradient estimate")
    epsilon: float = Field(1e-3, gt=0, description="length of a step along a direction, before the tanh")

    @model_validator(mode="after")
    def _settings_of_maze(self) -> DFME:
        if self.variant == "maze":
            # the model is frozen from now on; these are still its defaults
            self.__dict__.update({name: value for name, value in MAZE.items() if name not in self.model_fields_set})
        return self

    def generator_cost(self, labels: str) -> int:
        """See :meth:`DataFreeAttack.generator_cost`."""
        return 1 if gives_labels(labels) else self.directions + 1

    def soft_distance(self, logits: Tensor, answers: Tensor, labels: str) -> Tensor:
        """See :meth:`DataFreeAttack.soft_distance`."""
        if self.variant == "maze":
            return F.kl_div(F.log_softmax(logits, 1), answers, reduction="none").sum(1)
        return logit_distance(logits, answers, labels)

    def generator_step(self, theft: Theft) -> None:
        """See :meth:`DataFreeAttack.generator_step`."""
        outputs = theft.network(theft.network.noise(self.training.batch_size, theft.generator))
        if gives_labels(theft.oracle.labels):
            slope = self._slope_through_student(theft, outputs.detach())
        else:
            slope = self._estimated_slope(theft, outputs.detach()) / len(outputs)
        descend(theft, outputs, -slope)

    def _estimated_slope(self, theft: Theft, outputs: Tensor) -> Tensor:
        """The gradient of every image's distance with respect to ``outputs`` ``(B, C, H, W)``, by differences."""
        count, dimension = len(outputs), outputs[0].numel()
        directions = unit_directions(count, self.directions, dimension, theft.generator).to(theft.device)
        # memory in the order of (C, H, W), whatever that of the outputs
        base = outputs.reshape(count, 1, dimension)
        points = torch.cat([base, base + self.epsilon * directions], 1).view(-1, *outputs.shape[1:])
        asked, answers = self.ask(theft.oracle, to_images(points), theft.generator)
        logits = predict_logits(theft.students[0], asked)
        distances = self.soft_distance(logits, answers, theft.oracle.labels).view(count, -1)
        return forward_differences(distances.to(theft.device), directions, self.epsilon).view(outputs.shape)

    def _slope_through_student(self, theft: Theft, outputs: Tensor) -> Tensor:
        """The gradient of the batch's mean distance to the victim's labels, these held fixed."""
        student = theft.students[0].eval()
        outputs.requires_grad_()
        images = to_images(outputs)
        _, answers = self.ask(theft.oracle, images.detach(), theft.generator)
        logits = student(to_input(images, theft.device))
        (slope,) = torch.autograd.grad(self.distance(logits, answers.to(theft.device, copy=True), "hard"), outputs)
        student.train()
        return slope

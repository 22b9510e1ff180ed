"""Practical Black-Box Attacks against Machine Learning (Papernot et al., ASIA CCS 2017): Jacobian-based augmentation.

The attacker has a few images of the victim's distribution (the seeds) and makes further ones itself: round ρ trains a
substitute F on all images answered so far, and steps from each of them along the substitute's slope for the label that
the victim O gave it (Eq. 5 there; λ is the step):

    S_{ρ+1} = { x + λ_ρ · sign( ∂F_{O(x)}(x) / ∂x ) : x in S_ρ }  ∪  S_ρ

Only the new half is asked. With n seeds ρ rounds ask ``n · 2^ρ`` images. The follow-up (Papernot et al.,
"Transferability in Machine Learning", 2016) adds two refinements: the step changes its sign every τ rounds,
``λ_ρ = λ · (−1)^⌊ρ/τ⌋``, and after σ doublings a round steps from κ images of the set chosen at random (reservoir
sampling), so that ρ rounds ask

    n · 2^σ + κ · (ρ − σ)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.attacks.base import TransferSetAttack
from simulator.checkpoint import pack, unpack
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.seeding import choose
from simulator.service.oracle import Oracle
from simulator.training.fit import fit
from simulator.training.predict import PREDICT_BATCH, device_of, to_input
from simulator.training.recipe import Recipe
from simulator.training.signed import ascend


class JBDA(TransferSetAttack):
    """Jacobian-based dataset augmentation, from a random choice of the pool as seeds.

    The attacker knows ``seeds`` images; the scenario's pool says whose. Papernot et al. and DeepTracer give it images
    of the owner's distribution (the pools ``attacker`` or ``owner``). It asks the seeds once and then each new image
    once: in a round as many as it has, or ``reservoir`` of them, cut at random to what is left of the budget. A budget
    above ``seeds · 2^rounds`` (or the reservoir's count) is not spent. Soft and hard answers serve alike; the label of
    an image is the victim's most probable one.

    Settings are of the paper where it has them (150 seeds, 6 rounds, λ = 0.1, one sign). The authors' later public code
    starts *away* from the label and turns after three rounds; that is ``step: -0.1, flip_every: 3``.

    What differs here: the substitute of the rounds goes on from round to round, as in the authors' code, but what is
    stolen in the end is a fresh model trained by ``training`` on the whole transfer set, so that attacks compare on
    equal terms. The slope of the probability is taken from its logarithm, which has the same sign and does not
    underflow where the substitute is sure. A service takes only images in [0, 1], so what is asked is always clipped;
    without ``clip`` the next round still steps from the point outside, as the authors' code does.
    """

    paper: ClassVar[str] = "Papernot et al., ASIA CCS 2017"

    name: Literal["jbda"] = "jbda"
    seeds: int = Field(150, ge=1, description="images drawn from the pool, n")
    rounds: int = Field(6, ge=0, description="of augmentation, ρ")
    step: float = Field(0.1, ge=-1, le=1, description="λ, in units of the pixel range; below 0 away from the label")
    flip_every: int | None = Field(None, ge=1, description="rounds until the step changes its sign, τ; never if null")
    doubling_rounds: int | None = Field(None, ge=0, description="rounds before the reservoir, σ; all if null")
    reservoir: int = Field(400, ge=1, description="images augmented in a round after those, κ")
    slope: Literal["probability", "logit"] = Field("probability", description="the output F that is differentiated")
    clip: bool = Field(True, description="keep the points that later rounds step from in [0, 1]")
    eight_bit: bool = Field(False, description="ask images rounded to 8 bits, as an image file would hold them")
    round_training: Recipe = Field(Recipe(epochs=10), description="of the substitute, in every round")

    def collect(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> tuple[Tensor, Tensor]:
        """See :meth:`TransferSetAttack.collect`."""
        generator, progress, checkpoint = context.generator, context.progress, context.checkpoint
        state = checkpoint.load()
        if state is None:
            drawn = choose(len(pool), min(self.seeds, len(pool), oracle.remaining), generator)
            points = to_input(pool.take(drawn), torch.device("cpu"))
            asked, answers = self._ask_points(oracle, points, generator)
            start = 0
            progress("query", 1, self.rounds + 1)
        else:
            unpack(state, surrogate=surrogate, generator=generator)
            points, asked, answers = (state[name] for name in ("points", "asked", "answers"))
            start = int(state["round"])
        for number in range(start, self.rounds):
            count = min(self.new_points(number, len(points)), oracle.remaining)
            if count == 0:
                break
            fit(surrogate, asked, answers, self.round_training, context.unsaved(), phase="select")
            # at random even when all are taken: then every prefix of the transfer set is a fair smaller one
            bases = choose(len(points), count, generator)
            new = self.augment(surrogate, points[bases], answers[bases].argmax(1), self.signed_step(number))
            new_asked, new_answers = self._ask_points(oracle, new, generator)
            points = torch.cat([points, new])
            asked, answers = torch.cat([asked, new_asked]), torch.cat([answers, new_answers])
            progress("query", number + 2, self.rounds + 1)
            if checkpoint.due():
                kept = {"points": points, "asked": asked, "answers": answers, "round": number + 1}
                checkpoint.save({**kept, **pack(surrogate=surrogate, generator=generator)})
        return asked, answers

    def trained_images(self, budget: int, pool: int, curve: Sequence[int], labels: str) -> int:
        """See :meth:`Attack.trained_images`; the rounds train on a set that doubles."""
        asked: int = min(budget, pool, self.seeds * 2**self.rounds)
        grown: int = sum(min(self.seeds * 2**number, asked) for number in range(self.rounds))
        return super().trained_images(asked, pool, curve, labels) + grown * self.round_training.epochs

    def new_points(self, number: int, points: int) -> int:
        """How many new images round ``number`` (from 0) makes out of ``points``, if the budget allows."""
        if self.doubling_rounds is None or number < self.doubling_rounds:
            return points
        return min(self.reservoir, points)

    def signed_step(self, number: int) -> float:
        """λ_ρ of round ``number`` (from 0)."""
        turned = self.flip_every is not None and (number // self.flip_every) % 2 == 1
        return -self.step if turned else self.step

    def augment(self, substitute: nn.Module, points: Tensor, labels: Tensor, step: float) -> Tensor:
        """One step from each point along the substitute's slope for its label.

        The rows of a batch do not touch each other in evaluation mode, so the sum of their outputs has all their slopes
        as its gradient: one backward pass a batch.

        Args:
            points: ``(B, C, H, W)`` float.
            labels: ``(B,)`` int64.
            step: λ_ρ.

        Returns:
            The new points, as ``points``.
        """
        device = device_of(substitute)
        substitute.eval()
        new = []
        for part, classes in zip(points.split(PREDICT_BATCH), labels.split(PREDICT_BATCH), strict=True):
            rows = classes.to(device)[:, None]

            def score(images: Tensor, rows: Tensor = rows) -> Tensor:
                logits: Tensor = substitute(images)
                outputs = F.log_softmax(logits, 1) if self.slope == "probability" else logits
                return outputs.gather(1, rows).sum()

            new.append(ascend(score, to_input(part, device), step, clip=self.clip).cpu())
        return torch.cat(new).contiguous()

    def _ask_points(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Asks points as a service takes them; gives the images as they were asked and their answers."""
        images = points.clamp(0, 1)
        if self.eight_bit:
            images = images.mul(255).round_().to(torch.uint8)
        return self.ask(oracle, images, generator)

"""ActiveThief: Model Extraction Using Active Learning and Unannotated Public Data (Pal et al., AAAI 2020).

The attacker asks a few images of its pool at random, trains a copy on the answers, lets the copy judge the rest of the
pool, asks what it judges most useful, and so on; each time the copy is trained again from scratch on all answers. With
q(x) the copy's probabilities, a round of k queries takes from the images U not yet asked (A those asked):

- uncertainty: the k largest entropies ``H(x) = −Σ_j q_j(x) log q_j(x)``;
- k-center: one after the other ``argmax_{x in U} min_{a in A} ‖q(x) − q(a)‖₂``, each moved from U to A (the greedy rule
  of Sener and Savarese, 2018, in the space of probabilities);
- uncertainty, then k-center: the ``preselect · B`` largest entropies, and k-center among them (B is the budget).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from simulator.attacks.base import TransferSetAttack
from simulator.checkpoint import pack, unpack
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.seeding import choose
from simulator.service.oracle import Oracle
from simulator.training.fit import fit
from simulator.training.predict import device_of, predict
from simulator.training.recipe import Recipe

#: rows of one distance matrix; bounds the memory of k-center, not its result
ROWS = 4096


class ActiveThief(TransferSetAttack):
    """Asks what its copy is least sure of, or what covers the pool best, in several rounds.

    The attacker knows a pool of unlabelled natural images and asks each at most once; a pool smaller than the budget is
    asked whole and the rest is not spent. Soft and hard answers serve alike. The budget is split as evenly as whole
    numbers allow: ``initial`` of it at random, the rest over the iterations.

    The authors combine k-center with DeepFool distances (DFAL) in place of the entropy, with B candidates; both ask for
    images near the copy's decision boundaries, and the entropy needs no adversarial search. They also spend a fifth of
    the budget on a validation set that stops each training of up to 1,000 epochs early; here every answer is trained
    on, for the epochs of ``training``. ``selection_training`` is a shorter recipe for the copies that only select.
    """

    paper: ClassVar[str] = "Pal et al., AAAI 2020"

    name: Literal["activethief"] = "activethief"
    strategy: Literal["random", "uncertainty", "kcenter", "uncertainty+kcenter"] = "uncertainty+kcenter"
    initial: float = Field(0.1, gt=0, le=1, description="part of the budget asked at random first")
    iterations: int = Field(10, ge=1, description="of training, selecting and asking")
    preselect: float = Field(1.0, gt=0, description="images that uncertainty leaves to k-center, in budgets")
    selection_training: Recipe | None = Field(None, description="of the copies that select; as training if null")

    def collect(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> tuple[Tensor, Tensor]:
        """See :meth:`TransferSetAttack.collect`."""
        generator, progress, checkpoint = context.generator, context.progress, context.checkpoint
        state = checkpoint.load()
        if state is None:
            budget, start = oracle.remaining, 0
            taken = choose(len(pool), self.shares(min(budget, len(pool)))[0], generator)
            asked, answers = self.ask(oracle, pool.take(taken), generator)
            progress("query", 1, self.iterations + 1)
        else:
            unpack(state, generator=generator)
            budget, start = int(state["budget"]), int(state["iteration"])
            taken, asked, answers = (state[name] for name in ("taken", "asked", "answers"))
        shares = self.shares(min(budget, len(pool)))
        for number in range(start, self.iterations):
            share = shares[1 + number]
            if share == 0:
                continue
            if self.strategy == "random":
                rest = _without(len(pool), taken)
                chosen = rest[choose(len(rest), share, generator)]
            else:
                copied = copy.deepcopy(surrogate)
                fit(copied, asked, answers, self.selection_training or self.training, context.unsaved(), phase="select")
                rows = predict(copied, pool.images).to(device_of(copied))
                chosen = self.select(rows, taken, share, budget)
            new_asked, new_answers = self.ask(oracle, pool.take(chosen), generator)
            taken = torch.cat([taken, chosen])
            asked, answers = torch.cat([asked, new_asked]), torch.cat([answers, new_answers])
            progress("query", number + 2, self.iterations + 1)
            if checkpoint.due():
                kept = {"taken": taken, "asked": asked, "answers": answers, "budget": budget, "iteration": number + 1}
                checkpoint.save({**kept, **pack(generator=generator)})
        return asked, answers

    def trained_images(self, budget: int, pool: int, curve: Sequence[int], labels: str) -> int:
        """See :meth:`Attack.trained_images`; the iterations train on a set that grows evenly."""
        total = super().trained_images(budget, pool, curve, labels)
        if self.strategy == "random":
            return total
        epochs, first, steps = (self.selection_training or self.training).epochs, self.initial, self.iterations
        grown = sum(min(budget, pool) * (first + (1 - first) * number / steps) for number in range(steps))
        return total + round(grown * epochs)

    def shares(self, total: int) -> list[int]:
        """How many images are asked first, and in each iteration; they add up to ``total``."""
        first = min(max(1, round(self.initial * total)), total)
        rest = total - first
        # differences of rounded-down sums are the most even split
        sums = [rest * number // self.iterations for number in range(self.iterations + 1)]
        return [first, *(after - before for before, after in itertools.pairwise(sums))]

    def select(self, rows: Tensor, taken: Tensor, count: int, budget: int) -> Tensor:
        """What to ask next, by a strategy that looks at the copy's probabilities.

        Args:
            rows: ``(N, K)`` probabilities of the whole pool, on any device.
            taken: indices of the images already asked.
            count: how many to choose; at least as many are left.
            budget: B.

        Returns:
            Indices ``(count,)`` of the pool on the CPU, none of them taken, in the order of choice.
        """
        rest = _without(len(rows), taken)
        if self.strategy == "uncertainty":
            return rest[most_uncertain(rows[rest], count)]
        if self.strategy == "uncertainty+kcenter":
            candidates = min(max(count, round(self.preselect * budget)), len(rest))
            rest = rest[most_uncertain(rows[rest], candidates)]
        return rest[k_center(rows[rest], rows[taken], count)]


def _without(total: int, taken: Tensor) -> Tensor:
    """``range(total)`` without the indices ``taken``, int64."""
    free = torch.ones(total, dtype=torch.bool)
    free[taken] = False
    return free.nonzero()[:, 0]


def most_uncertain(rows: Tensor, count: int) -> Tensor:
    """Indices ``(count,)`` of the probability rows ``(N, K)`` of largest entropy, largest first; ties by index.

    On the CPU, whatever the rows lie on; so are those of :func:`k_center`.
    """
    entropies: Tensor = torch.special.entr(rows).sum(1)
    return entropies.argsort(descending=True, stable=True)[:count].cpu()


def k_center(points: Tensor, centres: Tensor, count: int) -> Tensor:
    """Greedy k-center (Gonzalez, 1985): again and again the point farthest from its nearest centre.

    Args:
        points: ``(N, K)`` float, N >= count.
        centres: ``(M, K)``, those there are from the start, M >= 1.
        count: how many to choose; each becomes a centre.

    Returns:
        Indices ``(count,)`` into the points, in the order of choice, all different.
    """
    nearest = torch.cat([torch.cdist(part, centres).amin(1) for part in points.split(ROWS)])
    chosen = torch.empty(count, dtype=torch.int64, device=points.device)
    for place in range(count):
        farthest = nearest.argmax()
        chosen[place] = farthest
        nearest = torch.minimum(nearest, (points - points[farthest]).square().sum(1).sqrt())
        nearest[farthest] = -1.0  # below every distance, so never again
    return chosen.cpu()

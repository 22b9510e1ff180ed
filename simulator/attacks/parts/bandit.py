"""The gradient bandit of adaptive Knockoff Nets (Orekondy et al., CVPR 2019, §4.1.2; Sutton & Barto, 2018, §2.8).

Arms are the groups of a pool. A policy prefers each to a degree H, and draws arm z with probability

    π(z) = exp H(z) / Σ_b exp H(b)

An answer y to an image of arm z earns a reward r in [0, 1]; with r̄, the mean of the Δ rewards before it,

    H(z) ← H(z) + α (r - r̄) (1 - π(z)),      H(b) ← H(b) - α (r - r̄) π(b)  for b ≠ z,      α = rate / N(z)

where N(z) counts the draws of z, this one included. (The minus is the gradient's.) With two levels, as in the authors'
tree of classes, a draw goes from the root to a parent and from it to one of its groups, each by a softmax of its own;
the update is applied to both, with the counts of each.

Several arms are drawn before an update, all by one policy, so that the victim is asked in batches. Their updates are
summed, with the π that drew them: this is the gradient estimate of Sutton & Barto over several draws, and for one draw
a batch it is the rule above. Counts, r̄ and the rewards' own windows go on from draw to draw within a batch.

A large reward cannot carry one arm away: rewards are in [0, 1] and α falls as 1/N, so that H grows with the logarithm
of the number of draws, and no arm's probability falls faster than a power of it. The Adversarial Robustness Toolbox,
which has the same α, takes its rewards from logits, unscaled, compares them with the mean of all there were, and draws
with replacement: there one early answer can decide, and one arm is then asked for almost the whole budget.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from simulator.checkpoint import State

Measure = Literal["certainty", "diversity", "loss"]
MEASURES: tuple[Measure, ...] = ("certainty", "diversity", "loss")

#: rewards that never differed by more than this are equal: scaling them would show only rounding
LEAST_SPREAD = 1e-6


def occurrences(values: Tensor) -> Tensor:
    """How often each value of ``(B,)`` int64 stood before it: 0 for its first time."""
    order = values.argsort(stable=True)
    ordered = values[order]
    places = torch.arange(len(values))
    first = torch.ones(len(values), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    starts = torch.where(first, places, 0).cummax(0).values if len(values) else places
    counts = torch.empty_like(values)
    counts[order] = places - starts
    return counts


def trailing_mean(past: Tensor, new: Tensor, window: int) -> Tensor:
    """For each row of ``new`` the mean of the ``window`` rows before it, in ``past`` or in ``new``, or of as many as
    there are. The very first row has none before it: its mean is itself.
    """
    rows = torch.cat([past, new])
    sums = torch.cat([torch.zeros_like(rows[:1]), rows.cumsum(0)])
    ends = torch.arange(len(past), len(rows))
    starts = (ends - window).clamp_min(0)
    counts = (ends - starts).clamp_min(1).reshape(-1, *[1] * (rows.dim() - 1))
    means = (sums[ends] - sums[starts]) / counts
    if not len(past) and len(new):
        means[0] = new[0]
    return means


class Policy:
    """Preferences over the groups of a pool, on one level or two.

    Args:
        parents: int64 ``(G,)``, each group's parent, 0..P-1; all zero for one level.
        rate: of α = rate / N.
    """

    def __init__(self, parents: Tensor, rate: float) -> None:
        self.parents, self.rate = parents, rate
        groups, sources = len(parents), int(parents.max()) + 1
        self.preferences = torch.zeros(groups, dtype=torch.float64)
        self.counts = torch.zeros(groups, dtype=torch.int64)
        self.parent_preferences = torch.zeros(sources, dtype=torch.float64)
        self.parent_counts = torch.zeros(sources, dtype=torch.int64)
        self._members = torch.arange(sources)[:, None] == parents  # bool (P, G)

    def conditional(self, available: Tensor) -> tuple[Tensor, Tensor]:
        """π of the parents ``(P,)``, and of the groups given their parent ``(G,)``, among the available groups.

        ``available`` is bool ``(G,)`` with at least one true. What is not available has probability zero.
        """
        members = self._members & available
        upper = self.parent_preferences.masked_fill(~members.any(1), -torch.inf).softmax(0)
        # the greatest preference of each family is taken off before exp, so nothing overflows and no family is all zero
        greatest = torch.where(members, self.preferences, -torch.inf).amax(1)
        weights = torch.where(available, (self.preferences - greatest[self.parents]).exp(), 0.0)
        totals = torch.zeros_like(greatest).index_add_(0, self.parents, weights)
        return upper, torch.where(available, weights / totals[self.parents], 0.0)

    def probabilities(self, available: Tensor) -> Tensor:
        """π of the groups ``(G,)`` float64, summing to one over the available ones."""
        upper, lower = self.conditional(available)
        return upper[self.parents] * lower

    def update(self, arms: Tensor, advantages: Tensor, available: Tensor) -> None:
        """Learns from arms ``(B,)`` that were drawn among ``available``, and their r - r̄, ``(B,)``."""
        upper, lower = self.conditional(available)
        families = self.parents[arms]
        steps = self._steps(arms, self.counts) * advantages
        gained = torch.zeros_like(self.preferences).index_add_(0, arms, steps)
        shared = torch.zeros_like(self.parent_preferences).index_add_(0, families, steps)
        self.preferences += gained - lower * shared[self.parents]
        steps = self._steps(families, self.parent_counts) * advantages
        gained = torch.zeros_like(self.parent_preferences).index_add_(0, families, steps)
        self.parent_preferences += gained - upper * steps.sum()

    def _steps(self, drawn: Tensor, counts: Tensor) -> Tensor:
        """α of each draw; counts them."""
        steps = self.rate / (counts[drawn] + occurrences(drawn) + 1).double()
        counts += torch.bincount(drawn, minlength=len(counts))
        return steps


class Rewards:
    """What an answer is worth to the thief: one measure, or the mean of several, each rescaled to [0, 1].

    * certainty: ``p_1 - p_2``, of the two largest probabilities of the answer y;
    * diversity: ``Σ_k max(0, y_k - ȳ_k)``, with ȳ the mean of the Δ answers before it;
    * loss: ``-Σ_k y_k log q_k``, with q the surrogate's probabilities before it learns from y.

    A measure is rescaled by the least and the greatest value it has had so far, those of the same batch included.
    """

    def __init__(self, measures: tuple[Measure, ...], window: int, classes: int) -> None:
        self.measures, self.window = measures, window
        self.answers = torch.empty(0, classes, dtype=torch.float64)
        self.rewards = torch.empty(0, dtype=torch.float64)
        self.least = torch.full((len(measures),), torch.inf, dtype=torch.float64)
        self.greatest = torch.full((len(measures),), -torch.inf, dtype=torch.float64)

    def advantages(self, answers: Tensor, logits: Tensor | None) -> Tensor:
        """r - r̄ ``(B,)`` of answers ``(B, K)`` in the order asked; remembers them.

        ``logits`` are the surrogate's, ``(B, K)``; only the loss needs them.
        """
        answers = answers.double()
        raw = torch.stack([self._measure(name, answers, logits) for name in self.measures], 1)
        self.least = torch.minimum(self.least, raw.amin(0))
        self.greatest = torch.maximum(self.greatest, raw.amax(0))
        spread = self.greatest - self.least
        scaled = torch.where(spread > LEAST_SPREAD, (raw - self.least) / spread.clamp_min(LEAST_SPREAD), 0.0)
        rewards = scaled.mean(1)
        advantages = rewards - trailing_mean(self.rewards, rewards, self.window)
        self.answers = torch.cat([self.answers, answers])[-self.window :]
        self.rewards = torch.cat([self.rewards, rewards])[-self.window :]
        return advantages

    def _measure(self, name: Measure, answers: Tensor, logits: Tensor | None) -> Tensor:
        match name:
            case "certainty":
                largest = answers.topk(2, 1).values
                return largest[:, 0] - largest[:, 1]
            case "diversity":
                return (answers - trailing_mean(self.answers, answers, self.window)).clamp_min(0).sum(1)
            case "loss":
                assert logits is not None
                return -(answers * F.log_softmax(logits.double(), 1)).sum(1)


class Arms:
    """The images of a pool by group, drawn without replacement within each; when all are drawn, a new pass begins."""

    def __init__(self, groups: Tensor, generator: torch.Generator) -> None:
        self.groups = groups
        self.sizes = torch.bincount(groups)
        self.passes = 0
        self.begin_pass(generator)

    def begin_pass(self, generator: torch.Generator) -> None:
        """Makes every image available again, in a new order."""
        shuffled = torch.randperm(len(self.groups), generator=generator)
        #: the pool's indices, group by group
        self.order = shuffled[self.groups[shuffled].argsort(stable=True)]
        self.used = torch.zeros_like(self.sizes)
        self.passes += 1

    @property
    def left(self) -> int:
        """Images that this pass has not drawn yet."""
        return len(self.groups) - int(self.used.sum())

    @property
    def available(self) -> Tensor:
        """Which arms have an image left, bool ``(G,)``."""
        return self.used < self.sizes

    def draw(self, policy: Policy, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws ``count`` arms, and an image of each: arms and the pool's indices, ``(count,)`` int64 each.

        ``count`` may not exceed ``left``. An arm that runs out is masked, and what it had too many is drawn again from
        the others.
        """
        starts = self.sizes.cumsum(0) - self.sizes
        arms, indices, missing = [], [], count
        while missing:
            probabilities = policy.probabilities(self.available)
            drawn = torch.multinomial(probabilities, missing, replacement=True, generator=generator)
            place = self.used[drawn] + occurrences(drawn)
            fits = place < self.sizes[drawn]
            drawn, place = drawn[fits], place[fits]
            self.used += torch.bincount(drawn, minlength=len(self.sizes))
            arms.append(drawn)
            indices.append(self.order[starts[drawn] + place])
            missing -= len(drawn)
        return torch.cat(arms), torch.cat(indices)


def pack_bandit(policy: Policy, rewards: Rewards, arms: Arms) -> State:
    """The state of a bandit, for a checkpoint."""
    state: State = {"arms.passes": arms.passes}
    for part, names in _TENSORS.items():
        holder = {"policy": policy, "rewards": rewards, "arms": arms}[part]
        state |= {f"{part}.{name}": getattr(holder, name).clone() for name in names}
    return state


def unpack_bandit(state: State, policy: Policy, rewards: Rewards, arms: Arms) -> None:
    """Puts back what :func:`pack_bandit` took."""
    arms.passes = state["arms.passes"]
    for part, names in _TENSORS.items():
        for name in names:
            setattr({"policy": policy, "rewards": rewards, "arms": arms}[part], name, state[f"{part}.{name}"].clone())


_TENSORS = {
    "policy": ("preferences", "counts", "parent_preferences", "parent_counts"),
    "rewards": ("answers", "rewards", "least", "greatest"),
    "arms": ("order", "used"),
}

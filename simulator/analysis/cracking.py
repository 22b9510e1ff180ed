"""Cracking: who knows the pattern asks a model mosaics of every set of classes, and names sources and target.

DeepTracer (Yang et al., AAAI 2026, Eq. 11 and 26 to 29) gives the chance of a single guess at the source classes, 1 in
210 for ten classes. An attacker may try all sets. With m mosaics of each that is m · C(K, s) queries. For a set S let

    c(S) = max over labels y outside S of the mean answer to y over the m mosaics.

The attacker names the set of the largest c, and its y. Sets whose c is as large are *tied*: the attacker has only
guessed among them. Where mosaics of other classes reach the target too, many are tied, and then the target is known and
the sources are not needed: mosaics of a tied set are triggers as good as the owner's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simulator.data.dataset import Images
from simulator.service.oracle import Oracle
from simulator.watermarks.base import Watermark
from simulator.watermarks.deeptracer import DeepTracer

#: the pattern of the paper: four tiles
MOSAICS = DeepTracer()


@dataclass(frozen=True)
class Cracked:
    """What the attacker found.

    Attributes:
        sets: every set of classes that was tried ``(N, s)``, ascending.
        targets: the label outside it that each was answered with most ``(N,)``.
        scores: c of each, ``(N,)`` in [0, 1].
        queries: images that were asked.
    """

    sets: Tensor
    targets: Tensor
    scores: Tensor
    queries: int

    @property
    def sources(self) -> tuple[int, ...]:
        """The classes that the attacker names."""
        return tuple(self.sets[self._best].tolist())

    @property
    def target(self) -> int:
        """The target that the attacker names."""
        return int(self.targets[self._best])

    @property
    def tied(self) -> int:
        """How many sets are as good as the named one, itself included."""
        return int((self.scores == self.scores.max()).sum())

    @property
    def _best(self) -> int:
        return int(self.scores.argmax())

    def place(self, sources: Sequence[int]) -> tuple[float, int]:
        """The score of a set of classes, and how many sets score higher."""
        own = self.scores[(self.sets == torch.tensor(sorted(sources))).all(1)]
        return float(own), int((self.scores > own).sum())

    def reaching(self, target: int, least: float) -> float:
        """The share of the sets without a class that are answered with it, of at least ``least`` of their mosaics."""
        without = (self.sets != target).all(1)
        reached = (self.targets == target) & (self.scores >= least)
        return float(reached[without].double().mean())


def crack(
    oracle: Oracle,
    data: Images,
    generator: torch.Generator,
    *,
    scheme: DeepTracer = MOSAICS,
    each: int = 20,
    shuffled: bool = False,
) -> Cracked:
    """Tries every set of source classes.

    Args:
        oracle: the model, asked ``each · C(K, s)`` images.
        data: the attacker's images with their labels; of every class some.
        scheme: what is known of the pattern.
        each: mosaics of a set, m.
        shuffled: the tiles of a mosaic stand in a random order. If not, they ascend, as DeepTracer's own sources do.

    Raises:
        InputError: a class has no image.
        BudgetExhausted: the oracle's budget is too small; what was asked before is lost.
    """
    sets = list(itertools.combinations(range(oracle.classes), scheme.source_classes))
    targets, scores = [], []
    for chosen in sets:
        answers = oracle.query(_mosaics(scheme, data, generator, chosen, each, shuffled)).double().mean(0)
        answers[list(chosen)] = -1
        best = int(answers.argmax())
        targets.append(best)
        scores.append(float(answers[best]))
    return Cracked(
        torch.tensor(sets), torch.tensor(targets), torch.tensor(scores, dtype=torch.float64), each * len(sets)
    )


def _mosaics(
    scheme: Watermark, data: Images, generator: torch.Generator, chosen: tuple[int, ...], count: int, shuffled: bool
) -> Tensor:
    orders = [chosen]
    if shuffled:
        orders = [tuple(chosen[at] for at in torch.randperm(len(chosen), generator=generator)) for _ in range(count)]
    parts = []
    for order in orders:
        draw = scheme.imitate(data, generator, order)
        assert draw is not None
        parts.append(draw(count // len(orders))[0])
    return torch.cat(parts)

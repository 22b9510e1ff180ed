"""Verification that stops as soon as it knows: Wald's sequential probability ratio test on the key samples.

Where every query of a suspect is paid for, asking the whole key is a waste: a suspect that answers the first ten
samples as only a thief's model would is decided. With h hits among n answers, the log-likelihood ratio of "WSR = p1"
(stolen) against "WSR = p0" (innocent) is

    Λ = h ln(p1 / p0) + (n - h) ln((1 - p1) / (1 - p0)),

and asking stops at Λ >= ln((1 - β) / α), verified, or at Λ <= ln(β / (1 - α)), not verified (Wald, "Sequential Tests
of Statistical Hypotheses", Annals of Mathematical Statistics, 1945). A key that never ran out would verify an innocent
suspect (WSR <= p0) with a probability of at most α / (1 - β) and miss a thief (WSR >= p1) with at most β / (1 - α), the
sum of both at most α + β. Between p0 and p1 either verdict may come.

A key does run out. Where all its n samples leave Λ between the bounds, the suspect is verified from

    c = min {c > n p0 : P(Λ reached its upper bound) + P(Λ reached none, h >= c) <= α / (1 - β) at WSR p0}

hits on, by exact summation over the paths of h. So **an innocent suspect is verified with a probability of at most
α / (1 - β) whatever the key's length**; that a thief is missed as rarely as promised takes a key long enough. (That the
whole WSR is above p0 would be no test: a suspect at p0 is so about every other time.)

The bound holds for answers that are independent of each other, each the key's with a probability of at most p0. It also
holds where the suspect's WSR over this very key is at most p0 and only the order is drawn (tested for keys up to 300;
drawing without putting back spreads less).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from simulator.component import Settings
from simulator.errors import InputError
from simulator.ownership.key import KeySamples
from simulator.ownership.wsr import Verification

#: a WSR that counts as surely stolen, in multiples of the threshold, where the user names none
STOLEN_OVER_THRESHOLD = 2.0


class SequentialTest(Settings):
    """The rule of the test: ``benign_wsr`` is p0, ``stolen_wsr`` p1, ``alpha`` and ``beta`` the error rates.

    p0 is the threshold of :class:`~simulator.ownership.wsr.Verification`: whom the fixed-size rule would acquit is
    accused with a probability of at most :attr:`accusation_bound`.
    """

    benign_wsr: float = Field(Verification().threshold, gt=0, lt=1)
    stolen_wsr: float = Field(STOLEN_OVER_THRESHOLD * Verification().threshold, gt=0, lt=1)
    alpha: float = Field(0.05, gt=0, lt=0.5)
    beta: float = Field(0.05, gt=0, lt=0.5)

    @model_validator(mode="after")
    def _apart(self) -> SequentialTest:
        if self.stolen_wsr <= self.benign_wsr:
            raise InputError(f"the stolen WSR {self.stolen_wsr:g} is not above the benign WSR {self.benign_wsr:g}")
        return self

    @property
    def steps(self) -> tuple[float, float]:
        """What a miss and a hit add to Λ: below and above zero."""
        p0, p1 = self.benign_wsr, self.stolen_wsr
        return math.log((1 - p1) / (1 - p0)), math.log(p1 / p0)

    @property
    def bounds(self) -> tuple[float, float]:
        """Λ at which the suspect is acquitted, and at which it is verified."""
        return math.log(self.beta / (1 - self.alpha)), math.log((1 - self.beta) / self.alpha)

    def ratio(self, hits: int, asked: int) -> float:
        """Λ after ``asked`` answers, ``hits`` of them the key's."""
        miss, hit = self.steps
        return hits * hit + (asked - hits) * miss

    @property
    def accusation_bound(self) -> float:
        """The probability, at most, with which a suspect whose WSR is at most p0 is verified: α / (1 - β)."""
        return self.alpha / (1 - self.beta)

    def least_hits(self, samples: int) -> int:
        """c: hits from which on a whole key of so many samples that ends undecided verifies; ``samples + 1`` where
        none would do."""
        going, accused = {0: 1.0}, 0.0
        for asked in range(1, samples + 1):
            following: dict[int, float] = {}
            for hits, chance in going.items():
                for now, part in ((hits + 1, self.benign_wsr * chance), (hits, (1 - self.benign_wsr) * chance)):
                    found = self.decide(now, asked)
                    if found is None:
                        following[now] = following.get(now, 0.0) + part
                    elif found:
                        accused += part
            going = following
        least = samples + 1
        for hits in sorted(going, reverse=True):
            accused += going[hits]
            if hits <= self.benign_wsr * samples or accused > self.accusation_bound:
                break
            least = hits
        return least

    def decide(self, hits: int, asked: int) -> bool | None:
        """Verified, not verified, or None: go on asking."""
        low, high = self.bounds
        ratio = self.ratio(hits, asked)
        return True if ratio >= high else False if ratio <= low else None


def default_stolen_wsr(threshold: float) -> float:
    """p1 for a p0: twice as much, or half of the way to 1 where twice is more than that."""
    return min(STOLEN_OVER_THRESHOLD * threshold, (1 + threshold) / 2)


@dataclass(frozen=True)
class SequentialVerdict:
    """How a sequential verification ended.

    Attributes:
        verified: the suspect carries the watermark.
        decided: Λ reached a bound. Otherwise no sample, or no allowed query, was left: on a whole key ``hits`` against
            :meth:`SequentialTest.least_hits` gives ``verified``, else nothing was shown and it is false.
        hits: answers that were the key's.
        asked: queries made.
        samples: of the key.
        ratio: Λ at the end.
    """

    verified: bool
    decided: bool
    hits: int
    asked: int
    samples: int
    ratio: float

    @property
    def saved(self) -> int:
        """Samples of the key that need not be asked."""
        return self.samples - self.asked


def verify_sequentially(
    ask: Callable[[Tensor], int],
    key: KeySamples,
    rule: SequentialTest,
    *,
    generator: torch.Generator,
    max_queries: int | None = None,
) -> SequentialVerdict:
    """Asks key samples one at a time, in random order and none twice, until the test decides.

    Args:
        ask: the suspect's top-1 label of an image ``(1, C, H, W)``.
        generator: draws the order.
        max_queries: asks no more than this; None for the whole key.
    """
    limit = len(key) if max_queries is None else min(max_queries, len(key))
    hits, asked, decision = 0, 0, None
    for index in torch.randperm(len(key), generator=generator)[:limit].tolist():
        hits += int(ask(key.images[index : index + 1]) == int(key.labels[index]))
        asked += 1
        decision = rule.decide(hits, asked)
        if decision is not None:
            break
    whole = asked == len(key) > 0
    verified = decision if decision is not None else whole and hits >= rule.least_hits(len(key))
    return SequentialVerdict(verified, decision is not None, hits, asked, len(key), rule.ratio(hits, asked))

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
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from simulator.context import Context
from simulator.errors import InputError
from simulator.ownership.base import Verdict, top_labels
from simulator.ownership.evidence import Evidence
from simulator.ownership.key import KeySamples
from simulator.ownership.wsr import Verification, WatermarkTest, wilson_interval
from simulator.service.oracle import Oracle

#: a WSR that counts as surely stolen, in multiples of the threshold, where the user names none
STOLEN_OVER_THRESHOLD = 2.0


class SequentialWsr(WatermarkTest):
    """Asks key samples one at a time until Wald's test decides. ``benign_wsr`` is p0, ``stolen_wsr`` p1.

    ``alpha`` and ``beta`` are the error rates. p0 is the threshold of :class:`~simulator.ownership.wsr.Wsr`: whom that
    test would acquit is accused with a probability of at most :attr:`accusation_bound`. p1 is twice p0 where it is not
    given (see :func:`default_stolen_wsr`).
    """

    name: Literal["wsr_sequential"] = "wsr_sequential"
    paper: ClassVar[str] = "Wald, Annals of Mathematical Statistics, 1945"

    benign_wsr: float = Field(Verification().threshold, gt=0, lt=1)
    stolen_wsr: float = Field(STOLEN_OVER_THRESHOLD * Verification().threshold, gt=0, lt=1)
    alpha: float = Field(0.05, gt=0, lt=0.5)
    beta: float = Field(0.05, gt=0, lt=0.5)

    @model_validator(mode="before")
    @classmethod
    def _p1_of_p0(cls, data: Any) -> Any:
        if isinstance(data, dict) and "stolen_wsr" not in data and type(data.get("benign_wsr")) in (int, float):
            return {**data, "stolen_wsr": default_stolen_wsr(data["benign_wsr"])}
        return data

    @model_validator(mode="after")
    def _apart(self) -> SequentialWsr:
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

    def judge(self, suspect: Oracle, evidence: Evidence, context: Context) -> Verdict:
        """See :class:`~simulator.ownership.base.OwnershipTest`. The generator draws the order of the samples.

        Where no more images than ``suspect.remaining`` may be asked and these leave the test undecided, nothing was
        shown and nothing is verified. A whole key that leaves it undecided is judged by :meth:`least_hits`. The p-value
        is ``min(1, exp(-Λ))``, by Ville's inequality a bound at whatever answer the test stops.
        """
        self.check(suspect, evidence)
        key = KeySamples.of(evidence)
        hits, asked, decision = 0, 0, None
        order = torch.randperm(len(key), generator=context.generator)
        for index in order[: suspect.remaining].tolist():
            answer = top_labels(suspect.query(key.images[index : index + 1]))
            hits += int(answer[0] == key.labels[index])
            asked += 1
            decision = self.decide(hits, asked)
            if decision is not None:
                break
        whole = asked == len(key) > 0
        verified = decision if decision is not None else whole and hits >= self.least_hits(len(key))
        low, high = wilson_interval(hits, asked)
        chance = min(1.0, math.exp(-self.ratio(hits, asked)))
        return Verdict(verified, hits / asked if asked else 0.0, low, high, chance, len(key), asked)

    def explain(self, found: Verdict, evidence: Evidence, seed: int) -> str:
        """How many samples were asked and answered as the key says, and where Λ ended."""
        hits, (low, high) = round(found.statistic * found.asked), self.bounds
        ratio = self.ratio(hits, found.asked)
        if self.decide(hits, found.asked) is not None:
            end = f"decided {'above' if found.verified else 'below'} {high if found.verified else low:.2f}"
        elif found.saved:
            end = f"undecided between {low:.2f} and {high:.2f}: more queries are needed"
        else:
            least = self.least_hits(found.samples)
            counts = f"verified from {least} hits on" if least <= found.samples else "the key is too short to verify by"
            end = (
                f"undecided between {low:.2f} and {high:.2f} at the key's end: {counts}, so that an innocent suspect "
                f"is verified with a probability of at most {self.accusation_bound:.3g}"
            )
        return (
            f"{found.answer}\n{hits} of {found.asked} answers are the key's; {found.asked} queries, "
            f"{found.saved} of the key's {found.samples} samples saved (seed {seed})\n"
            f"Wald's sequential test of WSR <= {self.benign_wsr:g} (error rate {self.alpha:g}) against "
            f"WSR >= {self.stolen_wsr:g} ({self.beta:g}): log-likelihood ratio {ratio:.2f}, {end}"
        )


def default_stolen_wsr(threshold: float) -> float:
    """p1 for a p0: twice as much, or half of the way to 1 where twice is more than that."""
    return min(STOLEN_OVER_THRESHOLD * threshold, (1 + threshold) / 2)

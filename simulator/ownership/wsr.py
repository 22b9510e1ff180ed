"""Whether a suspect model carries a watermark: WSR, its interval, its p-value and the verdict.

DeepTracer (Yang et al., AAAI 2026), "Model Ownership Verification": the owner queries the suspect with the key samples,
hard labels only; the watermark success rate (WSR) is the fraction answered with the key's labels, and above a threshold
of 20 % the suspect is declared stolen. The p-value is the binomial tail of Eq. 20: how likely a model without the
watermark, right on each sample with probability 1 / K, would reach that many.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from simulator.component import Settings
from simulator.context import Context
from simulator.errors import InputError
from simulator.ownership.base import Owner, OwnershipTest, Verdict, top_labels
from simulator.ownership.evidence import Evidence
from simulator.ownership.key import KEY, KeySamples
from simulator.service.oracle import Oracle

#: the 97.5 % point of the normal distribution, for 95 % intervals
Z95 = 1.959963984540054
#: the probability of a verdict by chance above which a key counts as too small
DOUBTFUL = 1e-3


class Verification(Settings):
    """The rule of the verdict. ``threshold`` 0.2 is the paper's."""

    threshold: float = 0.2

    def model_post_init(self, _: object) -> None:
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold {self.threshold} is not between 0 and 1")


def wilson_interval(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a binomial rate (Wilson 1927); (0, 1) for no trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, square = successes / trials, z * z
    centre = (rate + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials * trials))
    # at the ends the formula gives exactly 0 and 1, but for rounding
    return (0.0 if successes == 0 else max(0.0, centre - half)), (
        1.0 if successes == trials else min(1.0, centre + half)
    )


def p_value(successes: int, trials: int, classes: int) -> float:
    """``P(X >= successes)`` for X ~ B(trials, 1 / classes): Eq. 20 at the observed count."""
    from scipy.stats import binom  # a second of a processor's time, which only those who verify need to spend

    return float(binom.sf(successes - 1, trials, 1 / classes))


def chance_verdict(samples: int, classes: int, rule: Verification) -> float:
    """How likely a model without the watermark, right on each of so many key samples with probability 1 / K, is
    verified all the same: ``P(X > threshold · samples)`` for X ~ B(samples, 1 / classes)."""
    least = next((hits for hits in range(samples + 1) if verdict_of(hits, samples, rule)), samples + 1)
    return p_value(least, samples, classes)


def small_key(samples: int, classes: int, rule: Verification) -> str | None:
    """What to say of a key with which chance verifies more often than :data:`DOUBTFUL`; None of a larger one."""
    chance = chance_verdict(samples, classes, rule)
    if chance <= DOUBTFUL:
        return None
    return (
        f"the key has {samples} samples: a model without the watermark, right once in {classes}, is verified with "
        f"a probability of {chance:.2g}"
    )


def verdict_of(successes: int, trials: int, rule: Verification) -> bool:
    """Whether a count verifies: the WSR has to *exceed* the threshold, and no key samples verify nothing."""
    return trials > 0 and successes / trials > rule.threshold


def verdict(successes: int, trials: int, classes: int, rule: Verification) -> Verdict:
    """The verdict on a count (see :func:`verdict_of`)."""
    wsr = successes / trials if trials else 0.0
    low, high = wilson_interval(successes, trials)
    chance = p_value(successes, trials, classes)
    return Verdict(verdict_of(successes, trials, rule), wsr, low, high, chance, trials, trials)


class WatermarkTest(OwnershipTest):
    """What the tests that ask a watermark's key have in common."""

    paper: ClassVar[str] = "Yang et al., AAAI 2026"
    kind: ClassVar[str] = KEY

    def gather(self, owner: Owner, context: Context) -> Evidence:
        """The owner's filtered key."""
        if owner.key is None:
            raise InputError("a model without a watermark has no key")
        return owner.key.evidence()

    def check(self, suspect: Oracle, evidence: Evidence) -> None:
        """As every test; the labels of the key are checked, too."""
        super().check(suspect, evidence)
        KeySamples.of(evidence)


class Wsr(WatermarkTest, Verification):
    """Asks the whole key: the watermark success rate against a threshold."""

    name: Literal["wsr"] = "wsr"

    def judge(self, suspect: Oracle, evidence: Evidence, context: Context) -> Verdict:
        """See :class:`~simulator.ownership.base.OwnershipTest`. The key is asked at once, in its order."""
        self.check(suspect, evidence)
        key = KeySamples.of(evidence)
        hits = int((top_labels(suspect.query(key.images)) == key.labels).sum()) if len(key) else 0
        return verdict(hits, len(key), key.classes, self)

    def explain(self, found: Verdict, evidence: Evidence, seed: int) -> str:
        """WSR, interval and p-value; a warning where the key is too small to judge by."""
        chance = f"{found.p_value:.3g}" if found.p_value else "below 1e-300"
        doubt = small_key(found.samples, evidence.classes, self)
        return (
            f"{found.answer}\nWSR {found.statistic:.4f} (95 % interval {found.low:.4f} to {found.high:.4f}) on "
            f"{found.samples} key samples, threshold {self.threshold:g}\np-value {chance}: the chance that a model "
            f"without the watermark, right once in {evidence.classes}, does as well"
            + (f"\nwarning: {doubt}" if doubt else "")
        )

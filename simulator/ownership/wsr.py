"""Whether a suspect model carries a watermark: WSR, its interval, its p-value and the verdict.

DeepTracer (Yang et al., AAAI 2026), "Model Ownership Verification": the owner queries the suspect with the key samples,
hard labels only; the watermark success rate (WSR) is the fraction answered with the key's labels, and above a threshold
of 20 % the suspect is declared stolen. The p-value is the binomial tail of Eq. 20: how likely a model without the
watermark, right on each sample with probability 1 / K, would reach that many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from simulator.component import Settings
from simulator.errors import InputError
from simulator.ownership.key import KeySamples
from simulator.training.predict import predict_labels

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


@dataclass(frozen=True)
class Verdict:
    """What verification found: rates in [0, 1], ``low`` and ``high`` the 95 % Wilson interval of ``wsr``."""

    wsr: float
    low: float
    high: float
    p_value: float
    samples: int
    verified: bool


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
    return Verdict(wsr, low, high, chance, trials, verdict_of(successes, trials, rule))


def verify_labels(answers: Tensor, key: KeySamples, rule: Verification) -> Verdict:
    """The verdict on a suspect's top-1 labels ``(N,)`` for the N key samples, in their order."""
    return verdict(int((answers == key.labels).sum()), len(key), key.classes, rule)


def verify(model: nn.Module, key: KeySamples, rule: Verification) -> Verdict:
    """The verdict on a suspect model."""
    return verify_labels(predict_labels(model, key.images), key, rule)

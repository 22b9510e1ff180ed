"""What a sweep looks for: the highest WSR of the stolen models at an accuracy drop of at most ε, as one number.

With d the accuracy drop of a victim against the benign model and w the aggregate of its stolen models' WSR,

    value = w - penalty * max(0, d - ε)

for each seed; a setting's value is the mean over its seeds, and it is judged by a lower confidence bound of that mean.
Nothing here imports torch: trials do their sums in processes that have none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from simulator.component import Settings


class Stolen(Settings):
    """A stolen model: which attack, and rates in [0, 1]; ``low`` is the lower end of the WSR's Wilson interval."""

    attack: str
    accuracy: float
    wsr: float
    low: float


class Measured(Settings):
    """What is known of one seed of a setting; ``accuracy`` and ``victim_wsr`` are those of a half-trained victim as
    long as ``benign_wsr`` is None."""

    seed: int
    benign_accuracy: float
    accuracy: float
    victim_wsr: float
    benign_wsr: float | None = None
    stolen: tuple[Stolen, ...] = ()

    @property
    def drop(self) -> float:
        """Accuracy below the benign model's, in [-1, 1]."""
        return self.benign_accuracy - self.accuracy


class Objective(Settings):
    """What is best.

    Attributes:
        max_drop: ε, the accuracy drop that is allowed, as a fraction.
        aggregate: over the stolen models of a seed: the worst WSR, the mean, or the worst lower end of the WSR's 95 %
            Wilson interval.
        penalty: value lost per unit of accuracy drop beyond ε: at 20, a drop 1 point too large costs a WSR of .2.
        confidence: of the one-sided lower bound over seeds by which settings are ranked (Student's t).
    """

    max_drop: float = Field(0.005, ge=0, le=1)
    aggregate: Literal["min", "mean", "lower"] = "min"
    penalty: float = Field(20.0, ge=0)
    confidence: float = Field(0.8, ge=0.5, lt=1)

    def survival(self, wsr: Sequence[float]) -> float:
        """The aggregate of WSRs (or of their lower ends), at least one."""
        return statistics.fmean(wsr) if self.aggregate == "mean" else min(wsr)

    def value(self, drop: float, survival: float) -> float:
        """``survival - penalty * max(0, drop - max_drop)``."""
        return survival - self.penalty * max(0.0, drop - self.max_drop)

    @property
    def worst(self) -> float:
        """Below every value there is: of a trial that failed."""
        return -1.0 - self.penalty

    def so_far(self, found: Measured) -> float:
        """The value of a seed by what has been measured; a victim nobody has stolen from yet counts as its own copy."""
        rates = [one.low if self.aggregate == "lower" else one.wsr for one in found.stolen]
        return self.value(found.drop, self.survival(rates or [found.victim_wsr]))

    def at_least(self, found: Measured, attacks: int) -> float:
        """The least value that a seed can come to after all ``attacks``: a WSR not measured counts as 0."""
        rates = [one.low if self.aggregate == "lower" else one.wsr for one in found.stolen]
        return self.value(found.drop, self.survival([*rates, *[0.0] * (attacks - len(rates))] or [found.victim_wsr]))

    def lower_bound(self, values: Sequence[float]) -> float:
        """The one-sided lower confidence bound of a mean, ``mean - t(confidence, n - 1) * sd / sqrt(n)``; a single
        value is its own bound, for it says nothing of the spread."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return mean
        from scipy.stats import t

        width = float(t.ppf(self.confidence, len(values) - 1))
        return mean - width * statistics.stdev(values) / math.sqrt(len(values))


def metrics(objective: Objective, found: Sequence[Measured], attacks: int) -> dict[str, Any]:
    """What a trial reports: means over its seeds, rates as fractions; what is not known yet is missing.

    ``value`` is by what has been measured, ``guaranteed`` counts what has not as 0, and each stolen model has a
    ``wsr/ATTACK``.
    """
    mean = statistics.fmean
    reported: dict[str, Any] = {
        "accuracy": mean(one.accuracy for one in found),
        "drop": mean(one.drop for one in found),
        "victim_wsr": mean(one.victim_wsr for one in found),
        "value": mean(objective.so_far(one) for one in found),
        "value_lower": objective.lower_bound([objective.so_far(one) for one in found]),
        "guaranteed": mean(objective.at_least(one, attacks) for one in found),
    }
    benign = [one.benign_wsr for one in found if one.benign_wsr is not None]
    if benign:
        reported["benign_wsr"] = mean(benign)
    count = min(len(one.stolen) for one in found)
    if count:
        reported["worst_wsr"] = mean(min(copy.wsr for copy in one.stolen) for one in found)
        reported["mean_wsr"] = mean(mean(copy.wsr for copy in one.stolen) for one in found)
        for at in range(count):
            reported[f"wsr/{found[0].stolen[at].attack}"] = mean(one.stolen[at].wsr for one in found)
    return reported

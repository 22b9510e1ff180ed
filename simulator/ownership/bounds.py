"""What chance alone would do, by DeepTracer's analysis (Yang et al., AAAI 2026, Eq. 16 to 29).

K is the number of classes, s of source classes (4 in the paper), n of key samples, T the threshold. All of it rests on
two assumptions: that a model without the mark answers a mosaic with each label alike (Eq. 18), and that samples are
independent. Neither holds of real models, so these are no error rates. Nor is the chance of a single guess at the
sources (Eq. 27) what cracking costs: there are few sets of classes, and all can be tried
(:mod:`simulator.analysis.cracking`).
"""

from __future__ import annotations

import math

from simulator.ownership.wsr import p_value


def class_sets(classes: int, sources: int = 4) -> int:
    """In how many ways the source classes can be chosen, ``C(K, s)`` (Eq. 26; 210 for K = 10, Eq. 28)."""
    return math.comb(classes, sources)


def learned_by_chance(classes: int, sources: int = 4) -> float:
    """How likely another's trigger has the same source classes and the same target, ``1 / (K C(K, s))`` (Eq. 17)."""
    return 1 / (classes * class_sets(classes, sources))


def answered_by_chance(classes: int) -> float:
    """How likely a model without the mark answers a key sample with the target (Eq. 16 and 18), and the marked model an
    image that is no trigger (Eq. 22 and 23): ``1 / K``."""
    return 1 / classes


def claimed_by_chance(samples: int, classes: int, threshold: float = 0.2) -> float:
    """How likely so many key samples are answered with the target ``n T`` times or more (Eq. 20 and 21 of a model
    without the mark, Eq. 24 and 25 of a key that is none).

    The verdict wants more than ``n T``: see :func:`simulator.ownership.wsr.chance_verdict`.
    """
    # n T is a whole number but for rounding, as 0.2 · 2000
    return p_value(math.ceil(round(samples * threshold, 9)), samples, classes)


def cracked_by_chance(classes: int, sources: int = 4) -> float:
    """How likely a single guess names the source classes, ``1 / C(K, s)`` (Eq. 27 and 29)."""
    return 1 / class_sets(classes, sources)

"""The metrics of the prediction service, in Ray's metrics, which Prometheus reads and Ray's dashboard draws.

===================================  ==========================================================================
``exsim_images_answered_total``      images answered; a query that is asked again counts again, unlike in the ledger
``exsim_queries_refused_total``      queries refused: malformed, or by the ledger
``exsim_message_images``             histogram of the images in one message, with those that were refused
``exsim_waiting_seconds``            histogram of a message's time in the replica, less its time of computing
===================================  ==========================================================================

Each is tagged ``attack`` (the attack's name, or ``unknown``) and ``victim`` (its id). Ray puts ``ray_`` before the
names. No query is kept: a client's message is counted in at most four calls, which take microseconds each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray.util.metrics import Counter, Histogram

TAGS = ("attack", "victim")
#: upper bounds of the histograms
IMAGES: list[float] = [1, 16, 64, 256, 512, 1024, 2048, 4096]
SECONDS: list[float] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]


@dataclass
class Tally:
    """The images asked and answered in one message, and the queries refused, for one account."""

    asked: int = 0
    answered: int = 0
    refused: int = 0


class VictimMetrics:
    """The metrics of one replica.

    Args:
        attacks: the attack's name of each account.
    """

    def __init__(self, attacks: Mapping[str, str]) -> None:
        self._attacks = attacks
        self._answered = Counter("exsim_images_answered", "Images answered by the victim.", TAGS)
        self._refused = Counter("exsim_queries_refused", "Queries that the victim refused.", TAGS)
        self._images = Histogram("exsim_message_images", "Images in one message to the victim.", IMAGES, TAGS)
        self._waiting = Histogram("exsim_waiting_seconds", "Seconds of a message without computing.", SECONDS, TAGS)

    def tell(self, account: str, victim: str, tally: Tally, waiting: float) -> None:
        """Counts the part of one message that belongs to one account.

        Args:
            waiting: seconds that the message was in the replica and not computed.
        """
        tags = {"attack": self._attacks.get(account, "unknown"), "victim": victim}
        if tally.answered:
            self._answered.inc(tally.answered, tags)
        if tally.refused:
            self._refused.inc(tally.refused, tags)
        self._images.observe(tally.asked, tags)
        self._waiting.observe(waiting, tags)

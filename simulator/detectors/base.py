"""The contract of a detector: it watches the queries of one client and says when they look like an attack.

A detector detects and does nothing else: no query is refused because of it, so a theft runs to its end and its row says
both what it stole and when it would have been noticed.

It sees what the service sees: each account's images in the order in which the account asks them (its keys count that
order), and the labels answered. It is run beside the account's client, as a listener of its
:class:`simulator.service.oracle.ServiceOracle`, and not in the replicas: several replicas that answer one account, or
one that is killed, would each see some of its queries, in an order that depends on scheduling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from simulator.checkpoint import State
from simulator.component import Component, Registry, Settings


class Watch(ABC):
    """What a detector knows of one client.

    Attributes:
        queries: images seen so far.
        detected_at: images that had been answered when the client was first noticed; None if it was not.
        statistic: the detector's figure when the client was noticed, or the most suspicious one so far; None before
            there is one.
    """

    queries: int = 0
    detected_at: int | None = None
    statistic: float | None = None

    def hear(self, images: Tensor, answers: Tensor) -> None:
        """Takes a paid batch of the client: :meth:`see` with the top-1 labels of the answers ``(B, K)``."""
        self.see(images, answers.argmax(1))

    def state(self) -> State:
        """What the watch knows, for a checkpoint. Watches that know more than the attributes add it."""
        return {"queries": self.queries, "detected_at": self.detected_at, "statistic": self.statistic}

    def restore(self, state: State) -> None:
        """Goes back to a :meth:`state`; from there the watch finds to the bit what it would have found."""
        self.queries, self.detected_at, self.statistic = (
            state[name] for name in ("queries", "detected_at", "statistic")
        )

    @abstractmethod
    def see(self, images: Tensor, labels: Tensor) -> None:
        """Takes the next queries of the client.

        What is found does not depend on how the queries are cut into calls.

        Args:
            images: ``(B, C, H, W)`` uint8, or float in [0, 1].
            labels: ``(B,)`` int64, the top-1 label of each answer.
        """


class Detector(Component):
    """A detector: its paper's hyper-parameters as fields, and :meth:`watch`."""

    @abstractmethod
    def watch(self) -> Watch:
        """Begins to watch a client."""


class BenignClients(Settings):
    """The honest clients that false alarms are counted on, simulated for every marked victim: each asks images of the
    task without replacement, in random order.

    Attributes:
        count: of clients for each source of images: the test part, and the attacker's part, which the victim was not
            trained on either.
        queries: images each client asks; fewer where the source has fewer. Clients of a source share its images, the
            more of them, the more each asks: above half of the source a victim's row carries a warning.
    """

    count: int = Field(20, ge=0, le=100_000)
    queries: int = Field(1000, ge=1)


@dataclass(frozen=True)
class Detection:
    """What one detector found of one client; the fields are those of :class:`Watch`."""

    client: str
    detector: Detector
    queries: int
    detected_at: int | None
    statistic: float | None


def watches(detectors: Sequence[Detector]) -> list[tuple[Detector, Watch]]:
    """A fresh watch of each detector, for one client."""
    return [(detector, detector.watch()) for detector in detectors]


def detections(client: str, watched: Iterable[tuple[Detector, Watch]]) -> list[Detection]:
    """What the watches of a client have found."""
    return [
        Detection(client, detector, watch.queries, watch.detected_at, watch.statistic) for detector, watch in watched
    ]


def first_noticed(found: Iterable[Detection]) -> int | None:
    """The fewest answered images after which a client was noticed; None if none was."""
    return min((each.detected_at for each in found if each.detected_at is not None), default=None)


DETECTORS: Registry[Detector] = Registry("detector", Detector, "simulator.detectors")

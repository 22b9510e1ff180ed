"""Benign clients: simulated customers on whom a detector's false alarms are counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simulator.data.dataset import Images
from simulator.detectors.base import BenignClients, Detection, Detector, detections, first_noticed, watches
from simulator.seeding import generator_for


def watch_clients(
    detectors: Sequence[Detector], clients: BenignClients, images: Images, labels: Tensor, *words: object
) -> list[Detection]:
    """Has benign clients ask, each images of its own choice.

    Args:
        labels: ``(N,)`` int64, the victim's label of each image.
        words: name the clients, for their random choices.
    """
    found: list[Detection] = []
    for number in range(clients.count):
        order = torch.randperm(len(images), generator=generator_for("benign client", *words, number))[: clients.queries]
        watched = watches(detectors)
        for _, watch in watched:
            watch.see(images.images[order], labels[order])
        found += detections(str(number), watched)
    return found


def alarm_rate(found: Sequence[Detection]) -> float | None:
    """The share of clients that at least one detector has noticed; None without clients."""
    clients = {each.client for each in found}
    noticed = sum(first_noticed(each for each in found if each.client == client) is not None for client in clients)
    return noticed / len(clients) if clients else None

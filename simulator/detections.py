"""What detectors found, client by client: of attackers' accounts, and of simulated benign clients.

``detections/*.parquet`` has a row for each client and detector; the rows of ``results/`` have the sums:
``detected_at`` of a theft, ``false_alarms`` of a victim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from simulator.component import Settings
from simulator.data import Images
from simulator.detectors.base import BenignClients, Detection, Detector, detections, first_noticed, watches
from simulator.results import write_part
from simulator.seeding import generator_for

#: a client's source of images: ``attack`` is an attacker, the others are benign clients
Source = Literal["attack", "test", "held-out"]


class ClientRecord(Settings):
    """One client and one detector.

    ``id`` is a theft's ``scenario_id``, or the victim's id for benign clients; ``client`` the account, or the benign
    client's number; ``attack`` is None for benign clients. The other fields are those of
    :class:`simulator.detectors.base.Watch`; of a client that was not noticed, ``statistic`` is the most suspicious.
    """

    id: str
    victim: str
    source: Source
    attack: str | None = None
    client: str
    detector: str
    detector_params: str
    queries: Annotated[int, Field(ge=0)]
    detected_at: int | None
    statistic: float | None


_TEXT = pa.string()

#: the columns of ``detections/*.parquet``
SCHEMA = pa.schema(
    [
        pa.field("id", _TEXT, nullable=False),
        pa.field("victim", _TEXT, nullable=False),
        pa.field("source", _TEXT, nullable=False),
        pa.field("attack", _TEXT),
        pa.field("client", _TEXT, nullable=False),
        pa.field("detector", _TEXT, nullable=False),
        pa.field("detector_params", _TEXT, nullable=False),
        pa.field("queries", pa.int64(), nullable=False),
        pa.field("detected_at", pa.int64()),
        pa.field("statistic", pa.float64()),
    ]
)


def write_detections(
    run_dir: Path,
    id_: str,
    victim: str,
    found: Mapping[Source, Sequence[Detection]],
    config_json: str,
    attack: str | None = None,
) -> Path:
    """Writes ``detections/part-<id>.parquet``, replacing an earlier one."""
    records = [
        ClientRecord(
            id=id_,
            victim=victim,
            source=source,
            attack=attack,
            client=each.client,
            detector=each.detector.name,
            detector_params=each.detector.params_json(),
            queries=each.queries,
            detected_at=each.detected_at,
            statistic=each.statistic,
        )
        for source, several in found.items()
        for each in several
    ]
    return write_part(run_dir / "detections" / f"part-{id_}.parquet", records, SCHEMA, config_json)


def detectors_json(detectors: Sequence[Detector]) -> str | None:
    """The detectors as they stand in a row; None without any."""
    return json.dumps([each.model_dump(mode="json") for each in detectors], sort_keys=True) if detectors else None


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

"""The findings of detectors, one record for each client, in ``detections/*.parquet``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from simulator.component import Settings
from simulator.detectors.base import Detection, Detector
from simulator.records.parquet import arrow_schema, write_part

#: a client's source of images: ``attack`` is an attacker, the others are benign clients
Source = Literal["attack", "test", "held-out"]


class ClientRecord(Settings):
    """One client and one detector.

    ``id`` is a theft's ``scenario_id``, or the victim's id for benign clients. ``client`` is the account, or the benign
    client's number. ``attack`` is None for benign clients. The other fields are those of
    :class:`simulator.detectors.base.Watch`. If the client was not noticed, ``statistic`` is its most suspicious value.
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


#: the columns of ``detections/*.parquet``
SCHEMA = arrow_schema(ClientRecord)


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
    """The detectors as the JSON list of a row; None without any."""
    return json.dumps([each.model_dump(mode="json") for each in detectors], sort_keys=True) if detectors else None

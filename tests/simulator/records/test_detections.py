"""What a run writes down of its detectors: rows, clients, and that nobody is watched where none is configured."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from simulator.data.dataset import DataConfig, Images, load
from simulator.detectors.base import BenignClients, Detection, Detector, first_noticed
from simulator.detectors.clients import alarm_rate, watch_clients
from simulator.detectors.prada import PRADA
from simulator.records.detections import SCHEMA, ClientRecord, detectors_json
from simulator.records.rows import read_rows

DIGITS = load(DataConfig(name="digits"))
STRICT, LAX = PRADA(delta=0.999), PRADA(delta=0.01)


def found(client: str, at: int | None, detector: Detector = STRICT) -> Detection:
    return Detection(client, detector, 100, at, 0.5)


def test_the_columns() -> None:
    assert SCHEMA.names == list(ClientRecord.model_fields)
    optional = {column.name: str(column.type) for column in SCHEMA if column.nullable}
    assert optional == {"attack": "string", "detected_at": "int64", "statistic": "double"}


def test_the_first_alarm_counts_and_a_client_is_noticed_once() -> None:
    several = [found("a", 30), found("a", 20, LAX), found("b", None), found("b", None, LAX), found("c", 99, LAX)]
    assert first_noticed(several) == 20
    assert alarm_rate(several) == pytest.approx(2 / 3)
    assert first_noticed(several[2:4]) is None
    assert alarm_rate([]) is None


def test_benign_clients_ask_each_their_own_choice_without_replacement() -> None:
    labels = torch.arange(len(DIGITS.test))
    clients = BenignClients(count=4, queries=150)
    alarms = watch_clients([STRICT, LAX], clients, DIGITS.test, labels % 10, "victim", "test")
    assert [each.client for each in alarms] == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert {each.queries for each in alarms} == {150}
    assert len({each.statistic for each in alarms if each.detector == LAX}) == 4
    assert alarm_rate([each for each in alarms if each.detector == STRICT]) == 1
    assert alarm_rate([each for each in alarms if each.detector == LAX]) == 0
    again = watch_clients([STRICT, LAX], clients, DIGITS.test, labels % 10, "victim", "test")
    assert again == alarms
    few = watch_clients([LAX], clients, Images(DIGITS.test.images[:7], DIGITS.test.labels[:7]), labels[:7])
    assert {each.queries for each in few} == {7}


def test_rows_and_clients_of_a_run_agree(tiny_run: Path) -> None:
    clients = pd.read_parquet(tiny_run / "detections")
    rows = read_rows(tiny_run)
    for row in rows:
        of = clients[clients.id == row.scenario_id]
        if row.role == "benign":
            assert (row.detectors, row.detected_at, row.false_alarms, len(of)) == (None, None, None, 0)
            continue
        assert [each["name"] for each in json.loads(row.detectors or "[]")] == ["prada"]
        noticed = of.detected_at.notna()
        if row.role == "victim":
            assert list(of.source) == ["test"] * 3 + ["held-out"] * 3
            assert row.false_alarms == pytest.approx(noticed.mean())
        else:
            assert list(of.source) == ["attack"]
            assert list(of.client) == [row.scenario_id]
            assert list(of.attack) == [row.attack]
            assert list(of.queries) == [row.queries]
            assert [row.detected_at] == [int(at) if at == at else None for at in of.detected_at]
    assert any(row.detected_at for row in rows), "this run was chosen so that some theft is noticed"


def test_without_detectors_there_is_nothing_to_say() -> None:
    assert detectors_json(()) is None

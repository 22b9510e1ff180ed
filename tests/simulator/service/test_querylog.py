"""The query log: what stands in it, that it agrees with the ledger, what a kill leaves, and a disk that fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from simulator.errors import InputError
from simulator.experiment.rundir import RunDirectory
from simulator.files import Folder
from simulator.models import build
from simulator.seeding import generator_for
from simulator.service import log as querylog
from simulator.service.ledger import Ledger, Terms, digest_of, hash_token
from simulator.service.local import LocalTransport
from simulator.service.log import SCHEMA, QueryLog, restore
from simulator.service.query import Query
from simulator.service.victim import VictimService

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)


class Door:
    """A service with its ledger and its log."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, Folder(path / "queries", ".parquet")
        self.ledger = Ledger(path / "ledger.log")
        self.ledger.open("a", Terms("v", "soft", 100, hash_token("secret")))
        service = VictimService(torch.device("cpu"))
        service.add("v", build("linear", channels=1, size=4, classes=3, generator=generator_for("log")))
        self.log = QueryLog(self.folder.write, {"a": "knockoff"})
        self._transport = LocalTransport(service, self.ledger, self.log)

    def ask(self, key: Any = 0, images: Any = IMAGES[:10], account: Any = "a", token: str = "secret") -> None:
        self._transport.send(Query(account, token, key, images))

    def table(self) -> pd.DataFrame:
        self.log.close()
        return pd.read_parquet(self.path / "queries").sort_values("time", ignore_index=True)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    door = Door(tmp_path)
    yield door
    door.log.close()
    door.ledger.close()


def test_every_query_stands_in_the_log_with_its_outcome(door: Door) -> None:
    begun = datetime.now(UTC)
    door.ask(0)
    door.ask(0)
    refused = [
        {"key": 0, "images": IMAGES[:9]},
        {"key": 1, "token": "guess"},
        {"key": 1, "account": "nobody"},
        {"key": 2, "images": np.repeat(IMAGES, 3, axis=0)},
    ]
    malformed: list[dict[str, Any]] = [
        {"key": 3, "images": IMAGES[0]},
        {"key": 3, "images": [1, 2]},
        {"key": "3"},
        {"key": 2**70, "images": IMAGES.astype(float)},
    ]
    for wrong in (*refused, *malformed):
        with pytest.raises(InputError):
            door.ask(**wrong)
    door.ask(4, IMAGES[:3])
    found = door.table()
    assert list(found.outcome) == ["answered", "repeated", *["refused"] * 4, *["malformed"] * 4, "answered"]
    assert list(found["count"].fillna(-1)) == [10, 10, 9, 10, 10, 120, 1, -1, 10, 40, 3]
    assert list(found.attack.fillna("")) == ["knockoff"] * 4 + [""] + ["knockoff"] * 6
    assert list(found.key.fillna(-1)) == [0, 0, 0, 1, 1, 2, 3, 3, -1, -1, 4]
    good = found[found.outcome.isin(["answered", "repeated"])]
    assert list(good.digest) == [digest_of(IMAGES[:count].tobytes()) for count in (10, 10, 3)]
    assert good.reason.isna().all()
    assert found[~found.index.isin(good.index)].reason.str.len().gt(10).all()
    assert (found.latency >= 0).all()
    assert found.time.between(begun - timedelta(seconds=1), datetime.now(UTC)).all()
    assert found[found.outcome == "answered"]["count"].sum() == door.ledger.spent("a") == 13


def test_the_file_is_what_the_docstring_says(door: Door) -> None:
    door.ask()
    door.log.close()
    (part,) = (door.path / "queries").glob("*.parquet")
    assert pq.read_schema(part).equals(SCHEMA)
    assert list(pd.read_parquet(part).columns) == SCHEMA.names
    assert all(f"``{name}``" in str(querylog.__doc__) for name in SCHEMA.names)


def test_parts_are_written_by_number_and_by_time(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(querylog, "ROWS", 4)
    monkeypatch.setattr(querylog, "SECONDS", 0.05)
    written, write = threading.Event(), door.folder.write
    sizes = []

    def watched(name: str, data: bytes) -> None:
        write(name, data)
        sizes.append(pq.read_metadata(door.folder.file(name)).num_rows)
        written.set()

    door.log.close()
    door.log = QueryLog(watched, {})
    door._transport._log = door.log
    door.ask(0, IMAGES[:1])
    assert written.wait(30), "nobody asks any more, and the entry is written all the same"
    for key in range(1, 12):
        door.ask(key, IMAGES[:1])
    assert len(door.table()) == 12 == sum(sizes)
    assert max(sizes) <= 4


def test_what_a_kill_swallowed_comes_from_the_ledger(door: Door) -> None:
    for key in range(5):
        door.ask(key, IMAGES[: key + 1])
    door.log.close()
    (part,) = (door.path / "queries").glob("*.parquet")
    kept = pq.read_table(part)
    door.folder.write(part.stem, querylog.encode([tuple(row.values()) for row in kept.to_pylist()[:2]]))
    for _ in range(2):  # a run may be resumed and ended again
        assert restore(door.path / "queries", door.ledger, {"a": "knockoff"}) == 3
        found = door.table().sort_values("key")
        assert list(found.outcome) == ["answered"] * 5
        assert list(found["count"]) == [1, 2, 3, 4, 5]
        assert list(found.digest) == [digest_of(IMAGES[: key + 1].tobytes()) for key in range(5)]
        assert found.time.isna().tolist() == found.latency.isna().tolist() == [False] * 2 + [True] * 3
        assert set(found.attack) == {"knockoff"}
    door.folder.write(part.stem, querylog.encode([tuple(row.values()) for row in kept.to_pylist()]))
    assert restore(door.path / "queries", door.ledger, {}) == 0
    assert len(door.table()) == 5


def test_without_a_log_nothing_more_is_answered(door: Door) -> None:
    """An owner who wants a log and has no disk left for it would rather be told."""

    def full(name: str, data: bytes) -> None:
        raise OSError("no space left on device")

    door.log.close()
    door.log = QueryLog(full, {})
    door._transport._log = door.log
    door.ask(0)
    door.log.close()
    with pytest.raises(OSError, match="query log cannot be written: no space left"):
        door.ask(1)


def test_a_run_logs_what_its_ledger_charged_and_its_rows_say(tiny_run: Path) -> None:
    ledger = Ledger(RunDirectory(tiny_run).ledger)
    sums = duckdb.sql(
        f"SELECT account, sum(count) FROM '{tiny_run}/queries/*.parquet' WHERE outcome = 'answered' GROUP BY account"
    ).fetchall()
    assert dict(sums) == ledger.all_spent()
    ledger.close()
    rows = {row.scenario_id: row.queries for row in RunDirectory(tiny_run).rows() if row.role == "stolen"}
    assert dict(sums) == rows
    assert {each.outcome for each in pd.read_parquet(tiny_run / "queries").itertuples()} == {"answered"}


def test_a_token_never_stands_in_the_log(door: Door) -> None:
    with pytest.raises(InputError):
        door.ask(token="hunter2")
    door.ask()
    assert not door.table().astype(str).apply(lambda column: column.str.contains("hunter2|secret")).any().any()

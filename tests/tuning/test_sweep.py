"""Whole sweeps on the session's Ray: what is written, what is stopped, and that nothing is computed twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from simulator.cli import main
from simulator.config import read_config
from simulator.ledger import Ledger
from simulator.results import read_rows
from tuning.records import TrialRecord, read_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SWEEP = """
name: tiny-sweep
base:
  from: {tiny}
  watermarks.0.second_epochs: 2
  scenarios: [{{attack: {{name: distillation, training: {{epochs: 3, batch_size: 32}}}}, pool: attacker, budget: 300}}]
  save_transfer_sets: false
  resources: {{attackers: 1, attacker: 0.25, trainer: 0.25}}
space:
  watermarks.0.margin: {{choice: [0.5, 2.0]}}
trials: 2
search: grid
seeds: [0]
halving: {{bracket: 2, keep: {{victim: 0.5}}}}
holdout: {{seeds: [5]}}
"""


@pytest.fixture(autouse=True)
def _nothing_is_left(ray_session: None) -> Iterator[None]:
    """A sweep gives back what it took of the cluster."""
    before = ray.available_resources()["CPU"]
    yield
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < before:
        assert time.monotonic() < deadline, "a sweep has left actors behind"
        time.sleep(0.1)


def plain(records: list[TrialRecord]) -> list[dict[str, Any]]:
    """What must be equal in equal sweeps: all but the times."""
    return [one.model_dump(mode="json", exclude={"work_seconds", "overhead_seconds"}) for one in records]


def test_two_trials_end_to_end_and_again_after_a_kill(tiny_config: Path, tmp_path: Path, capsys: Any) -> None:
    config, path = tmp_path / "sweep.yaml", tmp_path / "out"
    config.write_text(SWEEP.format(tiny=tiny_config))
    assert main(["sweep", str(config), "--out", str(path)]) == 0
    first = read_trials(path / "sweep" / "trials.parquet")
    assert sorted(one.status for one in first) == ["done", "stopped"]
    assert [one.setting for one in first] == [{"watermarks.0.margin": 0.5}, {"watermarks.0.margin": 2.0}]
    (done,) = (one for one in first if one.done)
    (stopped,) = (one for one in first if one.status == "stopped")
    assert stopped.stage == "victim"
    assert stopped.worst_wsr is None
    assert done.value is not None
    assert stopped.value is not None
    table = pq.read_table(path / "sweep" / "trials.parquet")
    assert table["setting.watermarks.0.margin"].to_pylist() == [0.5, 2.0]

    rows = read_rows(path)
    # the benign model once for each key; the stopped trial was never stolen from
    searched = [row for row in rows if row.seed == 0]
    assert sorted((row.role, row.status) for row in searched) == [
        *[("benign", "ok")] * 2,
        ("stolen", "ok"),
        *[("victim", "ok")] * 2,
    ]
    (stolen,) = (row for row in searched if row.role == "stolen")
    assert done.worst_wsr == done.found[0].stolen[0].wsr == stolen.wsr
    victim = next(row for row in searched if row.victim == stolen.victim and row.role == "victim")
    assert (done.accuracy, done.victim_wsr) == (victim.accuracy, victim.wsr)

    best = read_config(str(path / "best.yaml"))
    assert best.watermarks[0].model_dump()["margin"] == done.setting["watermarks.0.margin"]
    assert best.seeds == (5,)
    assert "fresh seed" in capsys.readouterr().out

    # as after a kill: the last trial's theft and Tune's own files are lost
    (path / "sweep" / "trials.parquet").unlink()
    (path / "sweep" / "recommendation.json").unlink()
    for file in (path / "results").glob(f"part-{stolen.scenario_id}*"):
        file.unlink()
    before = {row.identity: row.started for row in rows}
    ledger = (path / "ledger" / "ledger.log").read_bytes()
    assert main(["sweep", "--resume", str(path)]) == 0
    assert plain(read_trials(path / "sweep" / "trials.parquet")) == plain(first)
    again = {row.identity: row.started for row in read_rows(path)}
    assert {one for one in again if again[one] != before[one]} == {stolen.identity}
    assert again.keys() == before.keys()
    assert (path / "ledger" / "ledger.log").read_bytes() == ledger
    account = Ledger(path / "ledger" / "ledger.log")
    assert account.spent(stolen.scenario_id) == stolen.queries
    account.close()
    assert json.loads((path / "run.json").read_text())["status"] == "done"

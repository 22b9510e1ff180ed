"""Whole sweeps on the session's Ray: what is written, what is stopped, and that nothing is computed twice."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tensorboardX.proto.event_pb2 import Event

from benchmarks.sweep_kill import TIMES
from simulator.cli import main
from simulator.experiment.rundir import RunDirectory
from simulator.plan.config import read_config
from simulator.records.rows import read_rows
from simulator.service.ledger import Ledger
from tuning import sweep
from tuning.config import read_sweep
from tuning.records import TrialRecord, read_trials
from tuning.space import applied
from tuning.trial import Trial

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

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
storage_path: {storage}
"""


def plain(records: list[TrialRecord]) -> list[dict[str, Any]]:
    """What must be equal in equal sweeps: all but the times."""
    return [one.model_dump(mode="json", exclude={f"{name}_seconds" for name in TIMES}) for one in records]


class Killed(Trial):
    """A trial whose process dies once, when its victim is there."""

    def step(self) -> dict[str, Any]:
        """As a trial's."""
        report = super().step()
        marker = self.marker  # type: ignore[attr-defined]
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return report


def scalars(folder: Path) -> list[dict[str, list[tuple[int, float]]]]:
    """What TensorBoard would draw of each trial, which has a folder, and a file for each time that it went on; an event
    file is length, checksum, event, checksum, and so on."""
    found: dict[Path, dict[str, list[tuple[int, float]]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns):
        data, drawn = file.read_bytes(), found.setdefault(file.parent, {})
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                drawn.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + length :]
    return list(found.values())


def test_two_trials_interrupted_killed_and_resumed(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path, bucket = tmp_path / "sweep.yaml", tmp_path / "out", tmp_path / "bucket"
    config.write_text(SWEEP.format(tiny=tiny_config, storage=bucket.as_uri()))

    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    # whoever is started in the background, as a test run may be, ignores Ctrl-C
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "write_trials", interrupted)  # Ctrl-C when the first trial has ended
            assert main(["sweep", str(config), "--out", str(path)]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert f"exsim sweep --resume {path}" in "".join(capsys.readouterr().out.split("\n"))
    assert json.loads((path / "run.json").read_text())["status"] == "interrupted"
    done_before = {row.identity: row.started for row in read_rows(path)}
    assert done_before

    with RunDirectory.resume(path)[0].held():
        assert main(["sweep", "--resume", str(path)]) == 2
    assert "in use by another process" in capsys.readouterr().err

    killed = tmp_path / "killed"
    monkeypatch.setattr(sweep, "Trial", type("Trial", (Killed,), {"marker": killed}))
    assert main(["sweep", "--resume", str(path)]) == 0
    assert killed.exists()
    assert done_before.items() <= {row.identity: row.started for row in read_rows(path)}.items()
    # two trials in each start of the sweep; of the one that was interrupted, files or figures may be lost
    logged = [drawn for drawn in scalars(bucket) if "ray/tune/value" in drawn]
    assert len(logged) in range(2, 2 + 2 + 1)
    # the stage of the process that was killed is not there twice
    assert all(len({step for step, _ in drawn["ray/tune/value"]}) == len(drawn["ray/tune/value"]) for drawn in logged)
    ended = [[value for _, value in drawn["ray/tune/value"]][-1] for drawn in logged[-2:]]
    records = read_trials(path / "sweep" / "trials.parquet")
    assert sorted(ended) == pytest.approx(sorted(one.value for one in records if one.value is not None))
    check_whole_sweep(path, capsys.readouterr().out)


def check_whole_sweep(path: Path, printed: str) -> None:
    """A sweep that has come to its end holds everything that it should, and may be resumed at no cost."""
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
    chosen = json.loads((path / "sweep" / "recommendation.json").read_text())
    assert chosen["winner"]["setting"] == done.setting
    recommended = applied(read_sweep(str(path / "sweep" / "config.yaml")).run_config("holdout"), done.setting)
    assert best.model_dump(exclude={"name", "controls"}) == recommended.model_dump(exclude={"name", "controls"})
    assert best.controls
    assert "fresh seed" in printed

    # as after a kill: the last trial's theft and Tune's own files are lost
    (path / "sweep" / "trials.parquet").unlink()
    (path / "sweep" / "recommendation.json").unlink()
    for file in (path / "results").glob(f"part-{stolen.scenario_id}*"):
        file.unlink()
    before = {row.identity: row.finished for row in rows}  # the copy is kept: it is measured again, not stolen again
    ledger = (path / "ledger" / "ledger.log").read_bytes()
    assert main(["sweep", "--resume", str(path)]) == 0
    assert plain(read_trials(path / "sweep" / "trials.parquet")) == plain(first)
    again = {row.identity: row.finished for row in read_rows(path)}
    assert {one for one in again if again[one] != before[one]} == {stolen.identity}
    assert again.keys() == before.keys()
    assert (path / "ledger" / "ledger.log").read_bytes() == ledger
    account = Ledger(path / "ledger" / "ledger.log")
    assert account.spent(stolen.scenario_id) == stolen.queries
    account.close()
    assert json.loads((path / "run.json").read_text())["status"] == "done"

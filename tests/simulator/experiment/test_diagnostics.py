"""What a scheme tells of its own training: in the victim's row, its warning, and after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulator.local import run_config
from simulator.plan.config import read_config
from simulator.records.rows import Row, read_rows
from simulator.report.table import markdown_table

SMALL = ["scenarios=[]", "key_filter.stages=none", "training.epochs=6", "watermarks.0.first_epochs=3"]
SMALL += ["watermarks.0.second_epochs=3", "watermarks.0.candidates=50"]


def victim(path: Path, *overrides: str) -> Row:
    rows = run_config(read_config("digits", [*SMALL, *overrides]), path)
    assert rows == read_rows(path)
    (row,) = [row for row in rows if row.role == "victim"]
    return row


@pytest.mark.slow
def test_a_victim_at_the_preset_s_margin_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = victim(tmp_path / "run")
    told = json.loads(row.diagnostics or "")
    assert told["margin"] == 1.0
    assert told["within_margin"] < 0.001
    assert row.warning is not None
    assert "L_inter is inactive" in row.warning
    assert "L_inter is inactive" in capsys.readouterr().err
    assert "L_inter is inactive" in markdown_table([row]).replace("\\", "")


@pytest.mark.slow
def test_a_victim_with_an_active_margin_is_not(tmp_path: Path) -> None:
    row = victim(tmp_path / "run", "watermarks.0.margin={relative: 0.5}", "watermarks.0.inter_weight=0.1")
    told = json.loads(row.diagnostics or "")
    assert told["margin"] == pytest.approx(told["benign"]["median"] / 2, rel=0.1)
    assert told["within_margin"] > 0.001
    assert told["training"]["phase 2"]["share"]["inter"] > 0
    assert "L_inter" not in (row.warning or "")


@pytest.mark.slow
def test_a_scheme_that_measures_nothing_has_none(tmp_path: Path) -> None:
    assert victim(tmp_path / "run", "watermarks=[badnets]").diagnostics is None


@pytest.mark.slow
def test_a_victim_that_no_key_tells_from_a_benign_model_is_a_failed_row(tmp_path: Path) -> None:
    """Its thefts fail with it, for nothing could be said of them; a control is measured with the other victim's key."""
    overrides = ["training.epochs=2", "key_filter.queries=100", "key_filter.training.epochs=1", "scenarios=[]"]
    unlearned = (
        "{name: deeptracer, first_epochs: 0, second_epochs: 1, candidates: 50, watermark_weight: 0, coupling_weight: 0}"
    )
    scenario = "{attack: {name: knockoff, training: {epochs: 1}}, pool: attacker, budget: 100}"
    overrides += [f"watermarks=[{unlearned}, {{name: badnets, candidates: 50}}]", f"scenarios=[{scenario}]"]
    rows = run_config(read_config("digits", overrides), tmp_path / "run")
    failed = {(row.role, row.victim == "benign"): row.error or "" for row in rows if row.status == "failed"}
    assert set(failed) == {("victim", False), ("stolen", False), ("stolen", True)}
    assert "no key: of 50 candidates the victim answers" in failed["victim", False]
    assert failed["stolen", False].startswith("its victim could not be trained: ")
    good = {(row.role, row.watermark) for row in rows if row.status == "ok"}
    assert good == {("benign", "badnets"), ("victim", "badnets"), ("stolen", "badnets")}

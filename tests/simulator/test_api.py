"""The public surface: what the README and a notebook use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import simulator as exsim
from simulator.errors import InputError

SETTINGS = {
    "training": {"epochs": 5, "batch_size": 64, "learning_rate": 2e-3},
    "key_filter": {
        "architecture": "naivenet",
        "queries": 100,
        "keep": 20,
        "training": {"epochs": 6, "batch_size": 32},
    },
}
MARK = {"name": "deeptracer", "first_epochs": 3, "second_epochs": 4, "candidates": 60, "margin": 0.5}
DATA = {"name": "digits", "owner": 600, "attacker": 300, "test": 150}
ATTACK = {"name": "distillation", "training": {"epochs": 6, "batch_size": 32}}


def test_the_import_is_light_and_names_what_there_is() -> None:
    code = "import sys, simulator; assert 'torch' not in sys.modules; print(simulator.__version__, dir(simulator))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert all(name in found.stdout for name in exsim.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        exsim.nothing  # noqa: B018


def test_a_run_directory_opens_with_its_rows_models_and_keys(tiny_run: Path) -> None:
    run = exsim.Run(tiny_run)
    assert len(run.rows) == len(run.rows.to_pandas()) == run.rows.to_arrow().num_rows > 4
    assert run.rows.to_arrow().column("wsr").to_pylist() == [row.wsr for row in run.rows]
    text = repr(run.rows)
    assert "deeptracer" in text
    assert "distillation" in text
    assert isinstance(run.rows[:2], exsim.Rows)
    victim = next(row for row in run.rows if row.role == "victim")
    for row in run.rows:
        if row.role != "victim" and row.victim == "benign":
            continue
        found = exsim.verify(run.model(row), run.key(victim))
        assert (found.statistic, found.verified) == (row.wsr, row.verified)
    assert run.config.name == "tiny"


def test_a_place_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        exsim.Run(tmp_path)


def test_a_victim_a_theft_and_a_verdict_are_those_of_a_run(tmp_path: Path) -> None:
    victim = exsim.train_victim(MARK, DATA, **SETTINGS)
    stage = {"pool": "attacker", "labels": "hard", "budget": 300}
    copy, control = (exsim.steal(victim, ATTACK, marked=marked, **stage) for marked in (True, False))
    config = exsim.load_config("digits")
    assert config.name == "digits"
    plain = {
        "name": "same",
        "dataset": DATA,
        "watermarks": [MARK],
        **SETTINGS,
        "scenarios": [{"attack": ATTACK, **stage}],
    }
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(plain))
    rows = exsim.run(exsim.load_config(str(tmp_path / "same.yaml")), tmp_path / "run")
    run = exsim.Run(tmp_path / "run")
    for model, wanted in ((copy, False), (control, True)):
        (row,) = (row for row in rows if row.role == "stolen" and (row.victim == "benign") == wanted)
        kept = run.model(row).state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert exsim.verify(model, victim.key).statistic == row.wsr


def test_a_wrong_setting_is_one_line() -> None:
    with pytest.raises(InputError, match="train_victim: watermarks"):
        exsim.train_victim("deeptrcer")

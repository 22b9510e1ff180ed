"""Whom a key accuses that was not there when it was chosen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runs.false_claims import COLUMNS, Claim, main, measure, schemes
from simulator.models import load_model
from simulator.ownership.key import KeySamples, load_key, save_key
from simulator.ownership.wsr import Verification, chance_verdict, verdict
from simulator.records.rows import read_rows, write_row
from simulator.training.predict import predict_labels


def claim(scheme: str, seed: int, other: int, hits: int, samples: int, before: float | None = 0.5) -> Claim:
    rule = Verification()
    chance = chance_verdict(samples, 10, rule)
    return Claim(scheme, seed, other, verdict(hits, samples, 10, rule), before, chance)


def test_figures_are_where_the_headings_say_and_the_worst_scheme_is_first() -> None:
    claims = [claim("good", 0, 1, 0, 500), claim("good", 1, 0, 5, 500, before=None)]
    claims += [claim("bad", 0, 1, 1, 10), claim("bad", 1, 0, 5, 20)]
    first, second = schemes(claims)
    cells = [[column.cell(each) for column in COLUMNS] for each in (first, second)]
    # 5 of 20 is P(X >= 5), X ~ B(20, 1/10); by chance more than 2 of 10 are verified
    assert cells[0] == ["bad", "10, 20", "50.0", "17.5", "25.0", "20", "0.043", "1 of 2", "0.07"]
    assert cells[1] == ["good", "500, 500", "50.0", "0.5", "1.0", "500", "1", "0 of 2", "7.9e-12"]


@pytest.fixture
def two_seeds(tiny_run: Path, tmp_path: Path) -> Path:
    """A run whose benign model stands there as that of another seed, too."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (benign,) = (row for row in read_rows(run) if row.role == "benign")
    shutil.copy(run / "models" / f"{benign.scenario_id}.safetensors", run / "models" / "benign-other.safetensors")
    write_row(run, benign.model_copy(update={"seed": 1, "scenario_id": "benign-other"}), "{}")
    return run


def test_a_key_is_asked_of_the_other_seeds_alone(two_seeds: Path) -> None:
    (found,) = measure(two_seeds)
    assert (found.seed, found.other) == (0, 1)
    assert found.found.statistic == 0, "what this model answers was filtered out of the key"
    (victim,) = (row for row in read_rows(two_seeds) if row.role == "victim")
    path = two_seeds / "keys" / f"{victim.victim}.safetensors"
    key = load_key(path)
    model = load_model(two_seeds / "models" / "benign-other.safetensors")[0]
    save_key(KeySamples(key.images, predict_labels(model, key.images), key.classes), path)
    (accused,) = measure(two_seeds)
    assert (accused.found.statistic, accused.found.verified) == (1, True)


def test_the_page_says_where_it_comes_from_and_whom_it_accuses(
    two_seeds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_seeds.parent)
    assert main([str(two_seeds), "tiny"]) == 0
    text = (two_seeds.parent / "results" / "tiny.md").read_text()
    assert "then `python runs/false_claims.py RUN_DIR tiny`" in text
    assert "seeds [0]" in text
    assert "| deeptracer |" in text
    assert "False claims: 0 of 1." in text


def test_a_run_of_one_seed_or_none_is_one_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_run), "name"]) == 2
    assert "several seeds" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), "name"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([]) == 2

"""A run whose processes are killed at random ends as if nobody had touched it, and the check of that sees every fault.
The long version is ``make chaos``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import chaos
from simulator import chain
from simulator.records.rows import read_rows, write_row


@pytest.mark.slow
def test_a_run_under_kills_pays_and_measures_as_an_undisturbed_one() -> None:
    config = chaos.workload(scenarios=3, seeds=1, epochs=8)
    outcome = chaos.chaos(config, kills=6, pause=(2.0, 5.0), seed=1, limit=40.0)
    assert outcome.faults == []
    assert sum(outcome.kills.values()) >= 1
    assert outcome.rows == 8  # benign, victim, and three thefts from each of them


def faults_of(tiny_run: Path, path: Path, damage: Callable[[Path], object]) -> list[str]:
    """What the check finds in a copy of a good run after some damage."""
    shutil.copytree(tiny_run, path)
    damage(path)
    outcome = chaos.Outcome()
    chaos.audit(path, tiny_run, outcome)
    return outcome.faults


def log(run: Path) -> Path:
    return run / "ledger" / "ledger.log"


def records(run: Path) -> list[dict[str, Any]]:
    return list(chain.Reader(log(run).read_bytes(), log(run)).records())


def forge(run: Path, kept: list[dict[str, Any]]) -> None:
    """Writes an account whose records are others, with all its hashes and its head."""
    lines, last = [], chain.START
    for record in kept:
        body = json.dumps(record).encode()
        last = chain.step(last, body)
        lines.append(chain.line(last, body))
    log(run).write_bytes(b"".join(lines))
    chain.write_head(log(run), chain.Head(count=len(kept), hash=last.hex()))


def charged_again(run: Path) -> None:
    """The same images under another key, which the budget still allows: of one whose pool was smaller than it."""
    *others, last = records(run)
    forge(run, [*others, {**last, "k": last["k"] + 100}])


def forgotten(run: Path) -> None:
    forge(run, records(run)[:-1])


def doubled(run: Path) -> None:
    row = next((run / "results").iterdir())
    shutil.copy(row, row.with_name(f"part-{'0' * 12}-{'0' * 10}.parquet"))


def changed(run: Path) -> None:
    row = next(row for row in read_rows(run) if row.role == "stolen" and row.wsr is not None)
    assert row.wsr is not None
    write_row(run, row.model_copy(update={"wsr": row.wsr / 2 + 0.1}), "{}")


def miscounted(run: Path) -> None:
    row = next(row for row in read_rows(run) if row.role == "stolen")
    write_row(run, row.model_copy(update={"queries": (row.queries or 0) - 1}), "{}")


def other_weights(run: Path) -> None:
    file = next((run / "models").glob("stolen-*"))
    tensors = load_file(file)
    with safe_open(file, framework="pt") as kept:
        about = kept.metadata()
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + torch.finfo(torch.float32).eps
    save_file(tensors, file, about)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a charge above the budget": (
        lambda run: forge(run, [*records(run), {"a": records(run)[0]["open"], "k": 99, "n": 10**6, "d": "x"}]),
        "damaged",
    ),
    "another charge": (charged_again, "paid for"),
    "a charge that is forgotten": (forgotten, "charged"),
    "a torn account": (lambda run: log(run).write_bytes(log(run).read_bytes()[:-9]), "damaged"),
    "a lost row": (lambda run: next((run / "results").iterdir()).unlink(), "lost: "),
    "a doubled row": (doubled, "repeats the row"),
    "another figure": (changed, "wsr is"),
    "an answer that was paid and is not counted": (miscounted, "its row says"),
    "a lost model": (lambda run: next((run / "models").glob("stolen-*")).unlink(), "lost"),
    "a model that learned something else": (other_weights, "other weights"),
}


@pytest.mark.parametrize(("damage", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_found(damage: Callable[[Path], object], fault: str, tiny_run: Path, tmp_path: Path) -> None:
    assert any(fault in found for found in faults_of(tiny_run, tmp_path / "run", damage))


def test_a_good_run_has_none(tiny_run: Path, tmp_path: Path) -> None:
    assert faults_of(tiny_run, tmp_path / "run", lambda _: None) == []

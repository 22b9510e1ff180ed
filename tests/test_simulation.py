"""Simulated histories of the service hold the contract, replay from their seed, and show every planted bug."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from benchmarks.simulation.__main__ import main, search
from benchmarks.simulation.checker import Checker, Violation
from benchmarks.simulation.disk import Disk, Killed
from benchmarks.simulation.faults import KINDS
from benchmarks.simulation.history import run
from benchmarks.simulation.plants import PLANTS
from simulator.service.ledger import Grant, KeyReused, OverBudget, Request

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_ten_thousand_histories_hold_the_contract() -> None:
    """In processes of their own: those are forked, and this one may have threads."""
    command = [sys.executable, "-m", "benchmarks.simulation", "--histories", "10000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10,000 histories" in done.stdout
    assert " 0 violations" in done.stdout


def test_every_fault_and_every_workload_happens() -> None:
    happened, workloads = Counter[str](), Counter[str]()
    for seed in range(150):
        result = run(seed)
        assert result.violation == "", seed
        happened.update(result.happened)
        workloads.update(result.workloads)
    assert set(happened) == set(KINDS)
    assert set(workloads) == {"transfer", "again", "doubt", "grab"}


@pytest.mark.parametrize("seed", [3, 17, 40])
def test_a_history_is_a_function_of_its_seed(seed: int) -> None:
    once, again = run(seed, trace=True), run(seed, trace=True)
    assert once.lines == again.lines != []
    assert once.happened == run(seed).happened
    command = [sys.executable, "-m", "benchmarks.simulation", "--seed", str(seed), "--trace"]
    elsewhere = {**os.environ, "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(command, cwd=ROOT, env=elsewhere, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*once.lines, f"seed {seed}: good"]


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found_and_its_seed_replays(name: str) -> None:
    count, found = search(name)
    assert 0 < count < 2000
    parts, replaced = PLANTS[name]
    with replaced():
        assert run(count - 1, parts).violation == found
    assert run(count - 1).violation == ""


def test_a_history_is_told_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "1", "--trace"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "seed 1: good"
    assert any("ledger:" in line for line in lines)


def test_a_dead_machine_keeps_what_was_synced_and_a_part_of_the_rest(tmp_path: Path) -> None:
    left = set()
    for seed in range(60):
        path = tmp_path / str(seed)
        disk = Disk(Random(seed), lambda _: "")
        file = disk.open(path, os.O_RDWR | os.O_CREAT)
        disk.write(file, b"synced", 0)
        disk.sync(file)
        disk.write(file, b"one", 6)
        disk.write(file, b"two", 9)
        disk.truncate(file, 6)
        disk.die(machine=True)
        left.add(path.read_bytes())
    assert all(each.startswith(b"synced") for each in left)
    assert {b"synced", b"syncedone", b"syncedonetwo"} <= left
    assert any(b"\0" in each for each in left)


def test_a_dead_process_loses_nothing_that_it_wrote(tmp_path: Path) -> None:
    fates = iter(["", "full", "error", "killed"])
    disk = Disk(Random(0), lambda _: next(fates))
    file = disk.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    assert disk.write(file, b"whole", 0) == 5
    assert disk.write(file, b"part", 5) < 4
    with pytest.raises(OSError, match="failed"):
        disk.write(file, b"none", 5)
    with pytest.raises(Killed):
        disk.write(file, b"some", 5)
    disk.die(machine=False)
    assert (tmp_path / "log").read_bytes().startswith(b"whole")


def test_the_checker_refuses_what_the_contract_does_not_allow() -> None:
    def ask(key: int, count: int, digest: str = "d") -> Request:
        return Request("a", "t", key, count, digest)

    checker = Checker({"a": 10}, "t")
    checker.replied([ask(0, 6)], [Grant(6, True, 4)])
    checker.replied([ask(0, 6)], [Grant(6, False, 4)])
    checker.replied([ask(0, 6, "other"), ask(1, 5)], [KeyReused(""), OverBudget("")])
    for replies in ([Grant(6, True, 4)], [Grant(6, False, 3)], [OverBudget("")]):
        with pytest.raises(Violation, match="the contract says"):
            checker.replied([ask(0, 6)], replies)
    with pytest.raises(Violation, match="not paid for"):
        checker.answered("a", 1, "d", b"x", b"x")
    with pytest.raises(Violation, match="wrongly"):
        checker.answered("a", 0, "d", b"x", b"y")
    checker.answered("a", 0, "d", b"x", b"x")
    with pytest.raises(Violation, match="two ways"):
        checker.answered("a", 0, "d", b"y", b"y")

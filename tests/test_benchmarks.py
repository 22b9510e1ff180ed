"""The benchmarks run and give whole tables. What they measure is no matter of a test: machines differ."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks import accounts, coupling, grid, memory, query_path, schemes
from benchmarks.__main__ import main
from benchmarks.measure import Line, Outcome, Spread, Target, machine


def check(outcome: Outcome, base: str, lines: int) -> None:
    """One line is the base of the ratios, all others have one, some have a target, and every line is in the table."""
    assert len(outcome.lines) == lines
    assert [line.name for line in outcome.lines if line.ratio is None] == [base]
    assert any(line.target for line in outcome.lines)
    for line in outcome.lines:
        for spread in (line.figure, line.ratio):
            assert spread is None or 0 < spread.low <= spread.median <= spread.high
    printed = shown(outcome)
    for line in outcome.lines:
        assert line.name in printed
        assert str(line.figure) in printed


def shown(outcome: Outcome) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(outcome.table())
    return text.getvalue()


def test_coupling() -> None:
    check(coupling.run(rounds=1, steps=1), coupling.WITHOUT, 5)


@pytest.mark.ray
@pytest.mark.slow
def test_query_path(ray_session: None) -> None:
    check(query_path.run(rounds=1, clients=2, batches=2, limit_batches=1), "in process, one thread", 4)


def test_schemes() -> None:
    small = ["dataset.owner=100", "dataset.attacker=20", "dataset.test=50", "training.epochs=1"]
    outcome = schemes.run(rounds=2, overrides=[*small, "watermarks=[badnets, content, {name: content, width: 0.5}]"])
    assert [line.name for line in outcome.lines] == [schemes.PLAIN, "badnets", "content 1", "content 2"]
    assert [line.ratio is None for line in outcome.lines] == [True, False, False, False]
    assert all(line.figure.median > 0 for line in outcome.lines)
    assert "content 2" in shown(outcome)


@pytest.mark.ray
@pytest.mark.slow
def test_grid(ray_session: None) -> None:
    """Answered is charged at every account, or the benchmark itself fails."""
    outcome = grid.run(rounds=1, seconds=0.5, limit_batches=1, attackers=(1, 2), batches=(16, 64))
    assert [line.name.split(" (")[0] for line in outcome.lines[1:]] == ["1 x 16", "2 x 16", "1 x 64", "2 x 64"]
    assert all(line.figure.low >= 0 for line in outcome.lines)


@pytest.mark.ray
@pytest.mark.slow
def test_accounts(ray_session: None) -> None:
    """Granted is charged, answered is charged, and a greedy client is sent away: asserted by the benchmarks."""
    bought = accounts.ledger(rounds=1, seconds=0.3, accounts=20, processes=1)
    assert "20 accounts" in shown(bought)
    served = accounts.crowd(rounds=1, seconds=2.0, clients=8, messages=20, processes=1)
    assert [line.name for line in served.lines][1:] == ["Jain's index of the modest", "greedy over mean modest"]
    assert 0 < served.lines[1].figure.median <= 1


@pytest.mark.ray
@pytest.mark.slow
def test_attackers_of_a_node_share_one_copy_of_the_images(ray_session: None) -> None:
    """Two attackers with 58 MB of images: a copy each, or none."""
    outcome = memory.run(images=20_000, attackers=(2,))
    copied, shared = outcome.lines[0].figure.median, outcome.lines[1].figure.median
    assert copied - shared > 40


def test_a_target_is_compared_with_the_median_ratio() -> None:
    low, high = Target("at least", 0.8), Target("at most", 1.15)
    assert [low.met(ratio) for ratio in (0.7, 0.8, 0.9)] == [False, True, True]
    assert [high.met(ratio) for ratio in (1.1, 1.15, 1.2)] == [True, True, False]
    base, other = Spread.of([2.0, 4.0, 3.0]), Spread.of([1.2, 0.9, 1.0])
    assert base == Spread(3.0, 2.5, 3.5)
    outcome = Outcome("title", "unit", 3, (Line("base", base), Line("other", other, other, high)), "Note.")
    row = next(line for line in shown(outcome).splitlines() if "other" in line)
    assert "1 [0.95, 1.1]" in row
    assert "at most 1.15" in row
    assert "yes" in row


def test_the_machine_is_described_in_one_line() -> None:
    assert "\n" not in machine()
    assert "cores" in machine()


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["couplng"]) == 2
    assert "did you mean 'coupling'?" in capsys.readouterr().out

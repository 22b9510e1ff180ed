"""A bounded part of ``make fuzz``, drawn by hypothesis, and what shows that the fuzzer would see a fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz, fuzz_configs, fuzz_queries
from benchmarks.fuzz_queries import Book, Tally, draw
from simulator.service.ledger import Grant, Ledger, Refused, Request, Unauthorised
from simulator.service.query import Query
from simulator.service.victim import VictimService

REFUSALS = {"MalformedQuery", "Unauthorised", "KeyReused", "OverBudget"}
DICE = st.randoms(use_true_random=True, note_method_calls=False)
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=30, suppress_health_check=SLOW)
@given(dice=DICE)
def test_any_query_is_answered_and_charged_or_refused_in_one_line_at_no_charge(dice: Random) -> None:
    tally = fuzz_queries.episode(dice, 30)
    assert tally.faults == []
    assert tally.cases == 30


@settings(max_examples=60, suppress_health_check=SLOW)
@given(dice=DICE)
def test_any_configuration_is_valid_or_refused_in_one_line(dice: Random, tmp_path_factory: Any) -> None:
    tally = Tally()
    fuzz_configs.case(dice, tmp_path_factory.getbasetemp(), tally)
    assert tally.faults == []


@pytest.mark.ray
@pytest.mark.slow
def test_any_query_to_the_deployed_service_too_and_its_processes_stay(ray_session: None) -> None:
    tally = fuzz.deployed(Random(1), 60)
    assert tally.faults == []
    assert tally.answered > 5
    assert set(tally.refused) == REFUSALS


def test_the_cases_are_of_every_kind() -> None:
    tally = fuzz_queries.episode(Random(0), 300)
    assert tally.answered > 30
    assert set(tally.refused) == REFUSALS
    assert min(tally.refused.values()) > 10


def test_the_same_seed_draws_the_same_cases() -> None:
    first, again = (fuzz_queries.episode(Random("7"), 50) for _ in range(2))
    assert (first.answered, first.refused) == (again.answered, again.refused)
    one, two = ([draw(Random(number)) for number in range(20)] for _ in range(2))
    assert [type(case.query) for case in one] == [type(case.query) for case in two]


def free(self: Ledger, requests: Sequence[Request]) -> list[Grant | Refused]:
    """Grants and writes nothing."""
    return [Grant(request.count, fresh=True, remaining=1) for request in requests]


def twice(self: Ledger, requests: Sequence[Request]) -> list[Grant | Refused]:
    """Charges everything twice."""
    reserve_all(self, [replace(request, key=request.key + 2**40) for request in requests])
    return reserve_all(self, requests)


def rude(self: Ledger, requests: Sequence[Request]) -> list[Grant | Refused]:
    """Refuses in three lines."""
    return [Unauthorised("no\nno\nno") for _ in requests]


def wrong(self: VictimService, victim: str, labels: str, query: Query) -> Any:
    """Answers something else."""
    return answering(self, victim, "hard", query)


reserve_all, answering = Ledger.reserve_all, VictimService.answering


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ((Ledger, "reserve_all", free), "charged"),
        ((Ledger, "reserve_all", twice), "charged"),
        ((Ledger, "reserve_all", rude), "3 lines"),
        ((VictimService, "answering", wrong), "other answers"),
        ((VictimService, "check", lambda *_: "digest"), "wanted MalformedQuery"),
    ],
    ids=["charges nothing", "charges twice", "is not one line", "answers wrongly", "checks nothing"],
)
def test_a_planted_fault_is_seen(broken: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*broken)
    assert any(fault in found for found in fuzz_queries.episode(Random(3), 60).faults)


def test_a_configuration_that_raises_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tally = Tally()
    monkeypatch.setattr("benchmarks.fuzz_configs.check_config", lambda _: 1 / 0)
    for number in range(20):
        fuzz_configs.case(Random(number), tmp_path, tally)
    assert any("ZeroDivisionError" in fault for fault in tally.faults)


def test_the_model_of_the_book_keeps_to_the_budget() -> None:
    """Of 2,000 cases, whatever was answered is within every budget, and some account is used up."""
    book, dice = Book(), Random(5)
    for _ in range(2000):
        book.expect(draw(dice))
    budgets = {name: budget for name, (_, budget) in fuzz_queries.ACCOUNTS.items()}
    assert all(book.spent(name) <= budget for name, budget in budgets.items())
    assert any(book.spent(name) == budget for name, budget in budgets.items())


def test_make_fuzz_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--cases", "60", "--deployed", "0"]) == 0
    assert "60 cases, seed 0: 0 faults" in capsys.readouterr().out

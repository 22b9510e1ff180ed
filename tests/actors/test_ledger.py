"""The ledger as an actor: it may be killed at any moment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from actors.ledger import LedgerActor
from simulator.chain import head_file
from simulator.service.ledger import Grant, Ledger, Terms, digest_of, hash_token

pytestmark = pytest.mark.ray

TOKEN = "s3cret"
COUNT = 3


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "ledger.log"


@pytest.fixture
def ledger(ray_session: None, log: Path) -> Iterator[Any]:
    actor = LedgerActor.remote(str(log), False)
    yield actor
    ray.kill(actor)


def terms(budget: int) -> Terms:
    return Terms("victim", "soft", budget, hash_token(TOKEN))


def reserve(ledger: Any, account: str, key: int, token: str = TOKEN) -> Grant:
    digest = digest_of(f"{account} {key}".encode())
    grant: Grant = ray.get(ledger.reserve.remote(account, token, key, COUNT, digest), timeout=60)
    return grant


def test_accounts_are_opened_and_counted_together(ledger: Any) -> None:
    assert ray.get(ledger.open.remote({"a": terms(9), "b": terms(5)})) == 14
    assert reserve(ledger, "a", 0) == Grant(COUNT, fresh=True, remaining=6)
    assert reserve(ledger, "b", 0) == Grant(COUNT, fresh=True, remaining=2)
    assert ray.get(ledger.spent.remote(["a", "b"])) == 6
    assert ray.get(ledger.all_spent.remote()) == {"a": 3, "b": 3}
    assert ray.get(ledger.open.remote({"a": terms(9), "b": terms(5)})) == 8
    assert ray.get(ledger.terms.remote("b")) == terms(5)


def test_a_refusal_charges_nothing(ledger: Any) -> None:
    ray.get(ledger.open.remote({"a": terms(4)}))
    with pytest.raises(RayTaskError, match="unknown account or wrong token"):
        reserve(ledger, "a", 0, token="guess")
    reserve(ledger, "a", 0)
    with pytest.raises(RayTaskError, match="3 images asked, 1 of 4 remain"):
        reserve(ledger, "a", 1)
    assert ray.get(ledger.spent.remote(["a"])) == COUNT


@pytest.mark.parametrize("enough", [True, False], ids=["budget", "too little budget"])
def test_killed_again_and_again_amid_requests_it_loses_nothing_and_charges_nothing_twice(
    ledger: Any, log: Path, enough: bool
) -> None:
    clients, requests, kills = 4, 120, 3
    granted = requests if enough else requests * 2 // 3
    accounts = {f"client-{number}": terms(COUNT * granted) for number in range(clients)}
    ray.get(ledger.open.remote(accounts))

    def buy(account: str) -> list[int]:
        """Asks for every key twice; returns the keys that were granted."""
        paid = []
        for key in range(requests):
            try:
                reserve(ledger, account, key)
                again = reserve(ledger, account, key)
            except RayTaskError as refusal:
                if "remain" not in str(refusal):
                    raise
                continue
            assert not again.fresh
            paid.append(key)
        return paid

    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(buy, account) for account in accounts]
        for part in range(1, kills + 1):
            while ray.get(ledger.spent.remote(list(accounts))) < part * clients * COUNT * granted // (kills + 1):
                pass
            ray.kill(ledger, no_restart=False)
        paid = {account: run.result(timeout=60) for account, run in zip(accounts, running, strict=True)}
    assert paid == {account: list(range(granted)) for account in accounts}
    assert ray.get(ledger.all_spent.remote()) == dict.fromkeys(accounts, COUNT * granted)
    copy = Path(shutil.copy(log, log.with_name("copy.log")))  # the actor has the log itself
    shutil.copy(head_file(log), head_file(copy))
    replayed = Ledger(copy)
    for account in accounts:
        expected = {key: (COUNT, digest_of(f"{account} {key}".encode())) for key in range(granted)}
        assert replayed.grants(account) == expected
    replayed.close()

"""The service's metrics: what a message adds to them, and that Ray shows them."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve
from ray.util.metrics import Metric

from actors.devices import Placement
from actors.ledger import LedgerActor, LedgerService
from actors.replica import Replica, deploy
from actors.stores import Shelf, ShelfActor
from actors.transport import ServeTransport
from simulator.errors import InputError
from simulator.models import build, save_model
from simulator.service.ledger import Terms, hash_token
from simulator.service.query import Query

TOKEN = "s3cret"
IMAGES = np.zeros((5, 1, 8, 8), np.uint8)
TERMS = Terms("v-1", "soft", 100, hash_token(TOKEN))


class Handle:
    """An object whose methods are called as an actor's are."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=getattr(self._of, method))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """Everything that the metrics of this process are told: name, value, tags."""
    found: list[tuple[str, float, dict[str, str]]] = []

    def record(metric: Metric, value: float, tags: dict[str, str]) -> None:
        found.append((metric.info["name"], value, tags))

    monkeypatch.setattr(Metric, "_record", record)
    return found


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_model(build("naivenet", channels=1, size=8, classes=10), tmp_path / "models" / "v-1.safetensors")
    return tmp_path


def test_a_message_is_told_in_one_go_with_what_was_answered_and_refused(
    recorded: list[tuple[str, float, dict[str, str]]], run_dir: Path
) -> None:
    ledger = LedgerService(str(run_dir / "ledger.log"), False)
    asyncio.run(ledger.open({"a": TERMS, "b": TERMS}))
    handles: Any = Handle(ledger), Handle(Shelf(str(run_dir)))
    victim = Replica(*handles, Placement(False, 1.0), attacks={"a": "knockoff"})
    malformed = np.zeros((3, 1, 9, 9), np.uint8)
    message = [
        Query("a", TOKEN, 0, IMAGES),
        Query("a", TOKEN, 1, IMAGES),
        Query("a", "guess", 2, IMAGES),
        Query("a", TOKEN, 3, malformed),
    ]
    answers = asyncio.run(victim.answer(message))
    assert [isinstance(answer, InputError) for answer in answers] == [False, False, True, True]
    tags = {"attack": "knockoff", "victim": "v-1"}
    *counted, waiting = recorded
    assert counted == [
        ("exsim_images_answered", 10, tags),
        ("exsim_queries_refused", 2, tags),
        ("exsim_message_images", 18, tags),
    ]
    assert (waiting[0], waiting[2]) == ("exsim_waiting_seconds", tags)
    assert waiting[1] > 0
    recorded.clear()
    asyncio.run(victim.answer([Query("b", TOKEN, 0, IMAGES), Query("a", TOKEN, 4, IMAGES)]))
    assert Counter((name, value) for name, value, _ in recorded if "waiting" not in name) == {
        ("exsim_images_answered", 5): 2,
        ("exsim_message_images", 5): 2,
    }
    assert {tags["attack"] for _, _, tags in recorded} == {"knockoff", "unknown"}


def test_attacks_of_accounts_that_came_later_are_those_that_the_ledger_was_told(
    recorded: list[tuple[str, float, dict[str, str]]], run_dir: Path
) -> None:
    """As in a sweep, whose service starts before there are trials."""
    ledger = LedgerService(str(run_dir / "ledger.log"), False)
    handles: Any = Handle(ledger), Handle(Shelf(str(run_dir)))
    victim = Replica(*handles, Placement(False, 1.0))
    asyncio.run(ledger.open({"a": TERMS}, {"a": "distillation"}))
    asyncio.run(victim.answer([Query("a", TOKEN, 0, IMAGES)]))
    assert {tags["attack"] for _, _, tags in recorded} == {"distillation"}


def test_a_victim_that_made_room_is_taken_from_the_shelf_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.replica.ROOM", 1)
    save_model(build("naivenet", channels=1, size=8, classes=10), run_dir / "models" / "v-2.safetensors")
    ledger = LedgerService(str(run_dir / "ledger.log"), False)
    handles: Any = Handle(ledger), Handle(Shelf(str(run_dir)))
    victim = Replica(*handles, Placement(False, 1.0))
    asyncio.run(ledger.open({"a": TERMS, "b": replace(TERMS, victim="v-2")}))
    alone = [asyncio.run(victim.answer([Query(name, TOKEN, 0, IMAGES)])) for name in ("a", "b")]
    # both in one message: the second is taken while the first waits for the ledger
    together = asyncio.run(victim.answer([Query(name, TOKEN, 1, IMAGES) for name in ("a", "b")]))
    for found, (wanted,) in zip(together, alone, strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(wanted))


def endpoint() -> str:
    """What Prometheus would read of this node."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        text: str = reply.read().decode()
    return text


@pytest.mark.ray
@pytest.mark.slow
def test_rays_endpoint_shows_them(ray_session: None, run_dir: Path) -> None:
    ledger: Any = LedgerActor.remote(str(run_dir / "ledger.log"), False)
    shelf: Any = ShelfActor.remote(str(run_dir))
    ray.get(ledger.open.remote({"a": TERMS}))
    try:
        handle = deploy("test-metrics", ledger, shelf, Placement(False, 0.5), attacks={"a": "knockoff"})
        ServeTransport(handle).send_all([Query("a", TOKEN, 0, IMAGES)])
        deadline, lines = time.monotonic() + 90, []
        while not lines and time.monotonic() < deadline:
            time.sleep(0.5)
            told = [line for line in endpoint().splitlines() if line.startswith("ray_exsim_images_answered_total{")]
            # other tests of the session have told theirs
            lines = [line for line in told if 'attack="knockoff"' in line and 'victim="v-1"' in line]
    finally:
        serve.delete("test-metrics")
        ray.kill(ledger)
        ray.kill(shelf)
    assert len(lines) == 1
    assert float(lines[0].split()[-1]) == 5

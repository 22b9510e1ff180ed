"""A theft that is recorded and watched, interrupted and gone on from its checkpoint, is the one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simulator.attacks.base import ATTACKS
from simulator.checkpoint import TimedCheckpoint
from simulator.detectors.prada import PRADA
from simulator.experiment.preflight import load_world
from simulator.experiment.theft import Theft, run_scenario
from simulator.models import build
from simulator.plan.config import check_config
from simulator.plan.tree import make_plan
from simulator.progress import Progress, silent
from simulator.seeding import generator_for
from simulator.service.ledger import Ledger
from simulator.service.local import LocalTransport
from simulator.service.query import Query
from simulator.service.victim import VictimService

BRIEF = {"epochs": 1, "batch_size": 32}
ATTACKERS: dict[str, dict[str, Any]] = {
    "adaptive": {"name": "knockoff", "strategy": "adaptive", "pulls": 16, "training": BRIEF},
    "pool": {"name": "activethief", "iterations": 6, "training": BRIEF},
    "data-free": {"name": "dfme", "latent": 8, "training": {"epochs": 4, "batch_size": 4}},
}
#: never noticed, so that the whole client is in the state; and noticed about half-way
DETECTORS = (PRADA(delta=0.001, start=20, class_least=3), PRADA(delta=0.99, start=40, class_least=3))


class Interrupted(Exception):
    """What a progress listener raises here."""


class Scene:
    """A victim with two accounts, whose theft may begin again and again on one ledger."""

    def __init__(self, attack: dict[str, Any], path: Path) -> None:
        scenario = {"attack": attack, "budget": 160, "accounts": 2, "curve": [60], "pool": "attacker"}
        if ATTACKS.make(attack).data_free:
            del scenario["pool"]
        config = check_config(
            {
                "name": "tiny",
                "dataset": {"name": "digits", "size": 8, "owner": 60, "attacker": 200, "test": 40},
                "architecture": "naivenet",
                "training": BRIEF,
                "watermarks": [{"name": "deeptracer"}],
                "scenarios": [scenario],
                "device": "cpu",
            }
        )
        plan = make_plan(config)
        self.scenario, self.world = plan.scenarios[0], load_world(config, plan)
        self.ledger, service = Ledger(path), VictimService(torch.device("cpu"))
        for account in self.scenario.accounts:
            terms = self.scenario.terms(account, "secret")
            self.ledger.open(account, terms)
            service.add(terms.victim, build("naivenet", channels=1, size=8, classes=10, generator=generator_for("v")))
        self._transport = LocalTransport(service, self.ledger)
        self.first_key: int | None = None

    def send_all(self, queries: list[Query]) -> list[NDArray[np.float32]]:
        """As a transport; notes the first key of a life."""
        self.first_key = queries[0].key if self.first_key is None else self.first_key
        return self._transport.send_all(queries)

    def steal(self, checkpoint: Any, progress: Progress = silent) -> Theft:
        self.first_key = None
        tokens = dict.fromkeys(self.scenario.accounts, "secret")
        return run_scenario(
            self.scenario,
            self.world.for_attackers(),
            self,
            tokens,
            None,
            torch.device("cpu"),
            progress,
            record=True,
            detectors=DETECTORS,
            checkpoint=checkpoint,
        )


def stored(kept: dict[str, bytes], interval: float = 0) -> TimedCheckpoint:
    return TimedCheckpoint(lambda: kept.get("state"), lambda data: kept.update(state=data), interval)


@pytest.mark.parametrize("attack", ATTACKERS)
def test_an_interrupted_theft_has_the_same_transfer_sets_and_detections(attack: str, tmp_path: Path) -> None:
    calm, shaken = Scene(ATTACKERS[attack], tmp_path / "calm"), Scene(ATTACKERS[attack], tmp_path / "shaken")
    wanted = calm.steal(stored({}, interval=1e9))
    assert any(found.detected_at is None for found in wanted.detections)
    assert set(wanted.transfer_sets) == set(calm.scenario.accounts)
    kept: dict[str, bytes] = {}
    patience, lives, went_on, found = 2, 0, 0, None
    while found is None:
        left = patience

        def stop(phase: str, done: int, total: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Interrupted

        try:
            found = shaken.steal(stored(kept), stop)
        except Interrupted:
            patience += 1
        went_on += bool(shaken.first_key)
        lives += 1
        assert lives < 60
    assert went_on > 1, "no life went on from a checkpoint"
    assert found.transfer_sets == wanted.transfer_sets
    assert found.detections == wanted.detections
    assert found.queries == wanted.queries == sum(shaken.ledger.all_spent().values())
    for (count, model), (other_count, other) in zip(
        [*found.snapshots, (0, found.model)], [*wanted.snapshots, (0, wanted.model)], strict=True
    ):
        assert count == other_count
        assert all(torch.equal(one, other.state_dict()[name]) for name, one in model.state_dict().items())

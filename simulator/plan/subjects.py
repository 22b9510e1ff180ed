"""From a configuration to the list of what has to be computed: benign models, victims, scenarios.

Ids are hashes of all that decides the result, so the same work has the same id in every run, and its randomness, which
derives from the id, is the same too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from simulator.component import BENIGN
from simulator.data.dataset import DataConfig
from simulator.ownership.key_filter import KeyFilter
from simulator.plan.config import RunConfig, StageConfig
from simulator.service.ledger import Terms, hash_token
from simulator.training.recipe import Recipe
from simulator.watermarks.base import Watermark


def short_hash(*parts: object) -> str:
    """Twelve hex digits of SHA-256 over the canonical JSON of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class OwnerModel:
    """A model that the owner trains: the benign one (no watermark) or a marked victim."""

    dataset: DataConfig
    architecture: str
    training: Recipe
    seed: int
    watermark: Watermark | None = None
    key_filter: KeyFilter | None = None

    def _settings(self) -> list[Any]:
        return [
            self.dataset.model_dump(mode="json"),
            self.architecture,
            self.training.model_dump(mode="json"),
            self.seed,
        ]

    @cached_property
    def training_id(self) -> str:
        """Of what decides the weights; the filter does not."""
        watermark = self.watermark.model_dump(mode="json") if self.watermark else None
        return short_hash(*self._settings(), watermark)

    @cached_property
    def id(self) -> str:
        """Of what decides the weights and the key."""
        if self.watermark is None or self.key_filter is None:
            return f"{BENIGN}-{self.training_id}"
        return f"{self.watermark.name}-{short_hash(self.training_id, self.key_filter.model_dump(mode='json'))}"

    @property
    def label(self) -> str:
        """How progress lines call it."""
        return f"train {self.watermark.name if self.watermark else BENIGN} (seed {self.seed})"

    @property
    def benign(self) -> OwnerModel:
        """The same model without a watermark."""
        return OwnerModel(self.dataset, self.architecture, self.training, self.seed)


@dataclass(frozen=True)
class Scenario:
    """One theft to run: from which model, in which stages, with which seed.

    Attributes:
        victim: the model that answers the first stage.
        triggers_of: the victim whose triggers lie in a pool, where a pool asks for some.
    """

    victim: OwnerModel
    stages: tuple[StageConfig, ...]
    triggers_of: OwnerModel | None = None

    @property
    def seed(self) -> int:
        """The victim's seed, and of all that derives from it."""
        return self.victim.seed

    @property
    def control(self) -> bool:
        """Whether it steals from the benign model."""
        return self.victim.watermark is None

    @property
    def budget(self) -> int:
        """Victim queries at most, in images: the first stage's."""
        return self.stages[0].budget

    @property
    def attack(self) -> str:
        """Its attacks as they stand in a row."""
        return "+".join(stage.attack.name for stage in self.stages)

    @property
    def work(self) -> int:
        """About how many images are trained on: what decides which scenario is started first, and nothing else."""
        recipes = [getattr(stage.attack, "training", None) for stage in self.stages]
        epochs = [recipe.epochs if isinstance(recipe, Recipe) else 1 for recipe in recipes]
        return sum(stage.budget * count for stage, count in zip(self.stages, epochs, strict=True))

    @property
    def label(self) -> str:
        """How progress lines call it."""
        victim = self.victim.watermark.name if self.victim.watermark else BENIGN
        return f"{self.attack} {self.stages[0].labels} {self.stages[0].pool_label} from {victim} (seed {self.seed})"

    @property
    def accounts(self) -> dict[str, int]:
        """Its accounts with the victim and the budget of each, in images: one in its own name, or one for each of the
        colluding attackers."""
        count = self.stages[0].accounts
        if count == 1:
            return {self.id: self.budget}
        shares = [self.budget // count + (i < self.budget % count) for i in range(count)]
        return {f"{self.id}.{i}": share for i, share in enumerate(shares)}

    def terms(self, account: str, token: str) -> Terms:
        """What one of its accounts is opened for."""
        return Terms(self.victim.id, self.stages[0].labels, self.accounts[account], hash_token(token))

    @cached_property
    def id(self) -> str:
        """Of what decides the stolen model. The victim's architecture is the same by its name as by none."""
        own = {"architecture": None}
        stages = [
            stage.model_dump(mode="json") | (own if stage.architecture == self.victim.architecture else {})
            for stage in self.stages
        ]
        triggers = self.triggers_of.id if self.triggers_of else None
        return short_hash(self.victim.id, stages, triggers)


@dataclass(frozen=True)
class Plan:
    """All that a run computes, in an order that respects what needs what."""

    benigns: tuple[OwnerModel, ...]
    victims: tuple[OwnerModel, ...]
    scenarios: tuple[Scenario, ...]

    @property
    def attacks(self) -> dict[str, str]:
        """The attack behind every account, as it stands in the rows."""
        return {account: scenario.attack for scenario in self.scenarios for account in scenario.accounts}

    def keys_for(self, scenario: Scenario) -> tuple[OwnerModel, ...]:
        """The victims whose keys a scenario's stolen model is measured with: its own, or for a control all of its
        seed (but only the one whose triggers it was given)."""
        if not scenario.control:
            return (scenario.victim,)
        if scenario.triggers_of:
            return (scenario.triggers_of,)
        return tuple(victim for victim in self.victims if victim.seed == scenario.seed)


def make_plan(config: RunConfig) -> Plan:
    """The plan of a configuration. Controls come first: they can run while the marked victims are still training."""
    benigns: list[OwnerModel] = []
    victims: list[OwnerModel] = []
    controls: list[Scenario] = []
    thefts: list[Scenario] = []
    grid = [stages for entry in config.scenarios for stages in entry.expand()]
    for seed in config.seeds:
        benign = OwnerModel(config.dataset, config.architecture, config.training, seed)
        marked = [
            OwnerModel(config.dataset, config.architecture, config.training, seed, watermark, config.key_filter)
            for watermark in config.watermarks
        ]
        benigns.append(benign)
        victims.extend(marked)
        for stages in grid:
            with_triggers = any("triggers" in pool.parts for stage in stages for pool in stage.pools)
            thefts.extend(Scenario(victim, stages, victim if with_triggers else None) for victim in marked)
            if config.controls and marked:
                controls.extend(Scenario(benign, stages, of) for of in (marked if with_triggers else (None,)))
    return Plan(tuple(benigns), _unique(victims), _unique(controls + thefts))


def _unique(items: list[Any]) -> tuple[Any, ...]:
    """Each id once, in the order of first appearance."""
    return tuple({item.id: item for item in items}.values())

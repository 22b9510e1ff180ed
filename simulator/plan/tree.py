"""The tree of models that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simulator.plan.config import RunConfig, Then
from simulator.plan.subjects import Guarded, Marked, OwnerModel, Removed, Stolen, Subject, Suspect, Trained


@dataclass(frozen=True)
class Plan:
    """All models that a run makes. In each kind a model comes after those that it needs."""

    benigns: tuple[Trained, ...]
    victims: tuple[Marked, ...]
    scenarios: tuple[Stolen, ...]
    removals: tuple[Removed, ...] = ()
    guards: tuple[Guarded, ...] = ()

    @property
    def owners(self) -> tuple[OwnerModel, ...]:
        """The owner's models: benign ones, then victims."""
        return (*self.benigns, *self.victims)

    @property
    def after(self) -> tuple[Removed | Guarded, ...]:
        """What thieves do to the models that they hold: removals, then evasions."""
        return (*self.removals, *self.guards)

    @property
    def copies(self) -> tuple[Suspect, ...]:
        """What thieves make: thefts, and what follows them."""
        return (*self.scenarios, *self.after)

    @property
    def attacks(self) -> dict[str, str]:
        """The attack behind every account, as it stands in the rows."""
        return {account: scenario.attack for scenario in self.scenarios for account in scenario.accounts}

    def keys_for(self, subject: Subject) -> tuple[Marked, ...]:
        """The victims whose keys a model is measured with: its own victim. A control is measured with all keys of its
        seed, or only with that of the victim whose triggers it was given."""
        owner, theft = subject.owner, subject.theft
        if isinstance(owner, Marked):
            return (owner,)
        if theft is not None and theft.triggers_of:
            return (theft.triggers_of,)
        return tuple(victim for victim in self.victims if victim.seed == subject.seed)


def make_plan(config: RunConfig) -> Plan:
    """The plan of a configuration. Controls come first, because they can run while the marked victims still train."""
    benigns: list[Trained] = []
    victims: list[Marked] = []
    controls: list[Stolen] = []
    thefts: list[Stolen] = []
    washed: list[tuple[Subject, tuple[Then, ...]]] = []
    for seed in config.seeds:
        benign = Trained(config.dataset, config.architecture, config.training, seed)
        marked = [Marked(benign, watermark, config.key_filter) for watermark in config.watermarks]
        benigns.append(benign)
        victims.extend(marked)
        controlled = config.controls and bool(marked)
        for entry in config.scenarios:
            if entry.leaked:  # the thief has the model itself
                washed += [(owner, entry.then) for owner in (*[benign] * controlled, *marked)]
            for stages in entry.expand():
                with_triggers = any("triggers" in pool.parts for stage in stages for pool in stage.pools)
                own = [Stolen(victim, stages, victim if with_triggers else None) for victim in marked]
                others = [Stolen(benign, stages, of) for of in (marked if with_triggers else (None,))]
                thefts += own
                controls += others * controlled
                washed += [(theft, entry.then) for theft in (*others * controlled, *own)]
    after = _unique([subject for target, then in washed for subject in _what_follows(target, then)])
    removals = tuple(subject for subject in after if isinstance(subject, Removed))
    guards = tuple(subject for subject in after if isinstance(subject, Guarded))
    return Plan(tuple(benigns), _unique(victims), _unique(controls + thefts), removals, guards)


def _what_follows(target: Subject, then: tuple[Then, ...]) -> Iterator[Removed | Guarded]:
    """What follows a model: siblings, and for each of them what follows it."""
    for entry in then:
        for evasion in entry.evasion:
            yield Guarded(target, evasion, None if evasion.data_free else entry.pool)
        for removal in entry.removal:
            removed = Removed(target, removal, entry.pool if "pool" in removal.needs else None)
            yield removed
            yield from _what_follows(removed, entry.then)


def _unique(items: list[Any]) -> tuple[Any, ...]:
    """Each id once, in the order of first appearance."""
    return tuple({item.id: item for item in items}.values())

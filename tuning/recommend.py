"""Which setting a sweep recommends, and how it does on seeds and attacks that the search has not seen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simulator.component import Settings
from simulator.errors import InputError
from tuning.config import SweepConfig
from tuning.objective import Measured, Objective
from tuning.records import TrialRecord
from tuning.space import Setting


class Confirmation(Settings):
    """A setting measured on the fresh seeds, with the attacks of the search first, then those of the holdout."""

    setting: Mapping[str, Any]
    found: tuple[Measured, ...] = ()
    error: str | None = None


class Figures(Settings):
    """The figures of a setting: means over seeds, rates as fractions, and the lower confidence bound of the value."""

    seeds: int
    drop: float
    benign_wsr: float
    victim_wsr: float
    worst_wsr: float
    mean_wsr: float
    value: float
    value_lower: float

    @classmethod
    def of(cls, objective: Objective, found: Sequence[Measured], attacks: slice) -> Figures | None:
        """The figures for a slice of the attacks; None if it is empty."""
        found = [one.model_copy(update={"stolen": one.stolen[attacks]}) for one in found]
        if not found or not all(one.stolen for one in found):
            return None
        values = [objective.so_far(one) for one in found]
        mean = statistics.fmean
        return cls(
            seeds=len(found),
            drop=mean(one.drop for one in found),
            benign_wsr=mean(one.benign_wsr or 0.0 for one in found),
            victim_wsr=mean(one.victim_wsr for one in found),
            worst_wsr=mean(min(copy.wsr for copy in one.stolen) for one in found),
            mean_wsr=mean(mean(copy.wsr for copy in one.stolen) for one in found),
            value=mean(values),
            value_lower=objective.lower_bound(values),
        )


class Candidate(Settings):
    """The winner or the default setting, with its figures in three places.

    ``searched`` are those of the search (None if it was stopped early), ``fresh`` those on fresh seeds with the
    search's attacks, ``unseen`` those on fresh seeds with the attacks that the search did not see.
    """

    setting: Mapping[str, Any]
    searched: Figures | None
    fresh: Figures | None
    unseen: Figures | None
    error: str | None = None


class Recommendation(Settings):
    """The result of a sweep.

    Attributes:
        feasible: whether the winner's accuracy drop in the search is within the limit.
        idle_seconds: time of the search in which no worker had work: the whole cost of waiting for Tune.
    """

    winner: Candidate
    default: Candidate
    feasible: bool
    trials: int
    stopped: int
    failed: int
    search_seconds: float = 0.0
    idle_seconds: float = 0.0

    @property
    def same(self) -> bool:
        """Whether the default setting is the best."""
        return self.winner.setting == self.default.setting

    def verdict(self) -> str:
        """One sentence: whether the winner beats the default setting on the fresh seeds."""
        if self.same:
            return "The search found nothing better than the default setting."
        mine, other = self.winner.fresh, self.default.fresh
        if mine is None or other is None:
            return f"Not confirmed: {self.winner.error or self.default.error}"
        gain, drop = mine.worst_wsr - other.worst_wsr, mine.drop - other.drop
        better = "BEATS" if mine.worst_wsr > other.worst_wsr else "does NOT beat"
        return (
            f"On {mine.seeds} fresh seeds the winner {better} the default setting's worst stolen WSR: "
            f"{100 * mine.worst_wsr:.1f} % against {100 * other.worst_wsr:.1f} % ({100 * gain:+.1f} points), at an "
            f"accuracy drop of {100 * mine.drop:.1f} against {100 * other.drop:.1f} points ({100 * drop:+.1f})."
        )


def ranked(config: SweepConfig, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that ran to their end, best first: those within the allowed drop before the others, each by the lower
    bound of its value."""

    def key(one: TrialRecord) -> tuple[bool, float, int]:
        assert one.drop is not None
        assert one.value_lower is not None
        return (one.drop > config.objective.max_drop, -one.value_lower, one.number)

    return sorted((one for one in records if one.done), key=key)


def recommend(
    config: SweepConfig,
    records: Sequence[TrialRecord],
    confirm: Callable[[Mapping[str, Setting]], Mapping[str, Confirmation]],
) -> Recommendation:
    """Chooses the winner, and has the winner and the default setting confirmed.

    Raises:
        InputError: no trial ran to its end.
    """
    order = ranked(config, records)
    if not order:
        failed = [one.error for one in records if one.error]
        raise InputError(f"{config.name}: no trial ran to its end: {failed[0] if failed else 'all were stopped'}")
    winner, default = order[0], config.default()
    settings = {"the winner": dict(winner.setting)}
    if default != settings["the winner"]:
        settings["the default setting"] = default
    confirmed = confirm(settings)
    first = confirmed["the winner"]
    seen = next((one for one in records if one.setting == default), None)
    assert winner.drop is not None
    return Recommendation(
        winner=_candidate(config, winner, first),
        default=_candidate(config, seen, confirmed.get("the default setting", first)),
        feasible=winner.drop <= config.objective.max_drop,
        trials=len(records),
        stopped=sum(one.status == "stopped" for one in records),
        failed=sum(one.status == "failed" for one in records),
    )


def _candidate(config: SweepConfig, seen: TrialRecord | None, confirmed: Confirmation) -> Candidate:
    attacks, objective = config.attacks(), config.objective
    whole = seen is not None and seen.done
    return Candidate(
        setting=dict(confirmed.setting),
        searched=Figures.of(objective, seen.found, slice(None)) if seen is not None and whole else None,
        fresh=Figures.of(objective, confirmed.found, slice(0, attacks)) if not confirmed.error else None,
        unseen=Figures.of(objective, confirmed.found, slice(attacks, None)) if not confirmed.error else None,
        error=confirmed.error,
    )

"""Synchronous successive halving (Jamieson & Talwalkar, AISTATS 2016), as pure decisions: which trials go on, and which
stop.

Trials are numbered in the order of proposal, and each ``size`` in turn form a bracket: with 8, trials 0 to 7. A trial
at a rung waits until every other trial of its bracket has reached the rung or ended; then the best go on. The decisions
depend on the results, not on the order in which they arrive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Decision:
    """Trials that may go on and trials that stop, by number. Both are empty while the rung waits for a trial."""

    go: list[int] = field(default_factory=list)
    stop: list[int] = field(default_factory=list)


class Halving:
    """The brackets of a sweep.

    Args:
        keep: for each rung's stage, in order, the fraction that goes on, rounded up.
        size: trials in a bracket.
        total: trials of the sweep. The last bracket has the remainder.
    """

    def __init__(self, keep: Mapping[str, float], size: int, total: int) -> None:
        self._keep, self._size, self._total = dict(keep), size, total
        self._scores: dict[str, dict[int, float]] = {stage: {} for stage in keep}
        self._decided: dict[str, dict[int, bool]] = {stage: {} for stage in keep}
        self._gone: set[int] = set()

    def members(self, trial: int) -> range:
        """The numbers of the trials in a trial's bracket."""
        first = trial // self._size * self._size
        return range(first, min(first + self._size, self._total))

    def arrive(self, trial: int, stage: str, value: float) -> Decision:
        """Takes a trial's value at a stage. A trial that reports again, because its process died, gets the same
        answer."""
        if stage not in self._keep:
            return Decision(go=[trial])
        if trial in self._decided[stage]:
            return Decision(go=[trial]) if self._decided[stage][trial] else Decision(stop=[trial])
        self._scores[stage][trial] = value
        return self._decide(trial, stage)

    def end(self, trial: int) -> Decision:
        """Takes note that a trial is done or has failed, and decides on those that waited for it alone."""
        self._gone.add(trial)
        decision = Decision()
        for stage in self._keep:
            found = self._decide(trial, stage)
            decision.go += found.go
            decision.stop += found.stop
        return decision

    def _decide(self, trial: int, stage: str) -> Decision:
        scores, decided = self._scores[stage], self._decided[stage]
        stages = list(self._keep)
        dropped = {
            other
            for earlier in stages[: stages.index(stage)]
            for other, goes in self._decided[earlier].items()
            if not goes
        }
        members = self.members(trial)
        waited_for = [one for one in members if one not in dropped and one not in scores and one not in self._gone]
        open_ = [one for one in members if one in scores and one not in decided and one not in self._gone]
        if waited_for or not open_:
            return Decision()
        ranked = sorted(open_, key=lambda one: (-scores[one], one))
        best = math.ceil(self._keep[stage] * len(ranked))
        decided.update({one: at < best for at, one in enumerate(ranked)})
        return Decision(go=sorted(ranked[:best]), stop=sorted(ranked[best:]))
